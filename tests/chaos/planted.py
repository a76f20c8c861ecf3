"""`planted.py BUG`: the supervisor with one promise broken, to see whether the checker notices.

The product knows nothing of this file: it replaces functions of the supervisor in this process before it starts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from pymongo.collection import Collection

from supervisor import supervisor as main_loop
from supervisor import worker
from supervisor.cli import run
from supervisor.cli.main import leave, main
from supervisor.pool import WorkerPool
from supervisor.store import transitions


def claim_without_condition() -> None:
    """Look first, then take: two workers see the same job."""
    conditional = Collection.find_one_and_update

    def find_one_and_update(self: Any, filter: dict[str, Any], update: Any, **options: Any) -> Any:
        if filter.get("status") == "pending":
            found = self.find_one(filter, sort=options.pop("sort", None), hint=options.pop("hint", None))
            if found is None:
                return None
            filter = {"_id": found["_id"]}
        return conditional(self, filter, update, **options)

    Collection.find_one_and_update = find_one_and_update  # type: ignore[method-assign,assignment]


def result_without_token() -> None:
    """A worker that was away writes its result over the state of the new owner."""
    transitions.held = lambda job_id, token: {"_id": job_id}


def reclaim_leaves_process() -> None:
    """A job is given to somebody else while what is left of its last attempt still runs."""
    WorkerPool.kill_strays = lambda self: False  # type: ignore[method-assign]
    WorkerPool.strays = lambda self: []  # type: ignore[method-assign]
    vars(run)["end_orphans"] = lambda: 0


def no_local_deadline() -> None:
    """A runner goes on with its job although the lease cannot be renewed."""
    for module in (run, worker, main_loop):
        vars(module)["lease_margin"] = lambda lease_seconds: -3600.0


BUGS: dict[str, Callable[[], None]] = {
    bug.__name__: bug
    for bug in (claim_without_condition, result_without_token, reclaim_leaves_process, no_local_deadline)
}

if __name__ == "__main__":
    BUGS[sys.argv[1]]()
    leave(main(["run"]))
