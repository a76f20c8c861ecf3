"""The plain way: a worker that polls MongoDB and launches `python script`.

    python -m tests.benchmarks.baseline URI DATABASE POLL_SECONDS

One claim at a time in the order of creation, output captured, outcome written. No leases, no limits: what people
write in an afternoon, with the index that comes to mind.
"""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import UTC, datetime
from typing import Any

from pymongo import ASCENDING, MongoClient, ReturnDocument

INDEX = [("status", ASCENDING), ("scheduled_date", ASCENDING)]


def work(uri: str, database: str, poll_seconds: float) -> None:
    jobs = MongoClient[dict[str, Any]](uri)[database]["jobs"]
    jobs.create_index(INDEX)
    while True:
        now = datetime.now(UTC)
        job = jobs.find_one_and_update(
            {"status": "pending", "scheduled_date": {"$lte": now}},
            {"$set": {"status": "running", "started_at": now, "updated_at": now}},
            sort=[("created_at", ASCENDING)],
            return_document=ReturnDocument.AFTER,
        )
        if job is None:
            time.sleep(poll_seconds)
            continue
        ended = subprocess.run(
            [sys.executable, job["python_path"], *job["python_args"]], capture_output=True, text=True, check=False
        )
        now = datetime.now(UTC)
        status = "completed" if ended.returncode == 0 else "failed"
        lines = [f"[{now.isoformat()}] {status}", f"--- STDOUT ---\n{ended.stdout}", f"--- STDERR ---\n{ended.stderr}"]
        jobs.update_one(
            {"_id": job["_id"]},
            {
                "$set": {"status": status, "finished_at": now, "updated_at": now, "exit_code": ended.returncode},
                "$push": {"logs": {"$each": lines}},
            },
        )


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], float(sys.argv[3]))
