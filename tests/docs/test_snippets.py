"""The Python of the documentation runs as it stands there, on a real MongoDB."""

from __future__ import annotations

from pathlib import Path

import pytest
from pymongo import MongoClient

from supervisor import JobManager
from tests.docs.test_docs import FENCE, PAGES

BLOCKS = [
    pytest.param(source, id=f"{page.name}-{number}")
    for page in PAGES
    for number, (language, source) in enumerate(FENCE.findall(page.read_text("utf-8")))
    if language == "python" and "with JobManager() as jobs:" in source
]
SECURITY = next(page for page in PAGES if page.name == "SECURITY.md")


@pytest.mark.parametrize("source", BLOCKS)
def test_the_api_as_it_is_shown(
    source: str, mongo_uri: str, db_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SUPERVISOR_MONGO_URI", mongo_uri)
    monkeypatch.setenv("SUPERVISOR_MONGO_DB", db_name)
    with JobManager() as jobs:
        jobs.create_job("one that waits", "/srv/jobs/report.py")
    exec(compile(source, "<documentation>", "exec"), {})
    with JobManager() as jobs:
        counts = jobs.reports.jobs_by_status()
    assert counts["pending"] + counts["completed"] == (2 if "create_job" in source else 1)
    assert counts["completed"] == ("find_and_lock_job" in source)


def test_the_roles_are_made_as_it_is_shown(mongo_uri: str, db_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = (source for language, source in FENCE.findall(SECURITY.read_text("utf-8")) if language == "python")
    monkeypatch.setenv("ADMIN_URI", mongo_uri)
    for name in ("WEB", "SUPERVISOR", "PEOPLE"):
        monkeypatch.setenv(f"PASSWORD_OF_{name}", "secret")
    with MongoClient[dict[str, object]](mongo_uri) as client:
        database = client[db_name]
        try:
            exec(compile(source.replace("job_db", db_name), "<documentation>", "exec"), {})
            users = {user["user"]: user["roles"][0]["role"] for user in database.command("usersInfo")["users"]}
            assert users == {"web": "producer", "supervisor": "supervisor", "people": "reader"}
        finally:
            database.command("dropAllUsersFromDatabase")
            database.command("dropAllRolesFromDatabase")
