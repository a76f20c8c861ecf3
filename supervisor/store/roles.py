"""What each kind of user may do in MongoDB, and nothing beyond: the roles of a deployment with authentication.

    admin = MongoClient("mongodb://admin:…@db/")
    for command in role_commands("job_db"):
        admin["job_db"].command(command)
    admin["job_db"].command("createUser", "web", pwd="…", roles=["producer"])

A producer inserts jobs, an operator also cancels and retries them, a supervisor runs them, a reader looks. Who may
insert a job decides what a supervisor executes: that right is as good as a shell as the user that jobs run as.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from supervisor.store import schema

Document = dict[str, Any]

_INDEXES = ["createIndex", "dropIndex", "listIndexes"]


def role_commands(db_name: str = "job_db", collection_name: str = "jobs") -> list[Document]:
    """The `createRole` commands, to be run on the database of the jobs by somebody who may."""

    def role(name: str, **actions: list[str]) -> Document:
        collections = {
            "jobs": collection_name,
            "output": schema.OUTPUT_COLLECTION,
            "supervisors": schema.SUPERVISORS_COLLECTION,
        }
        privileges = [
            {"resource": {"db": db_name, "collection": collections[which]}, "actions": allowed}
            for which, allowed in actions.items()
        ]
        return {"createRole": name, "privileges": privileges, "roles": []}

    return [
        role("producer", jobs=["find", "insert"]),
        role("operator", jobs=["find", "insert", "update"], output=["find"], supervisors=["find"]),
        role("reader", jobs=["find", "listIndexes"], output=["find"], supervisors=["find"]),
        role(
            "supervisor",
            jobs=["find", "update", "remove", "changeStream", *_INDEXES],
            output=["find", "insert", "remove", *_INDEXES],
            supervisors=["find", "insert", "update", "remove"],
        ),
    ]


if __name__ == "__main__":  # python -m supervisor.store.roles [DATABASE [COLLECTION]] | mongosh …
    for command in role_commands(*sys.argv[1:3]):
        print(f"db.runCommand({json.dumps(command)})")
