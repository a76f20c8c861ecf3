"""Settings: where they come from, what is refused, and what stays secret."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from supervisor.errors import ConfigurationError
from supervisor.settings import (
    OWN_COLLECTIONS,
    PREFIX,
    check_for_supervising,
    check_interpreter,
    load_settings,
    masked,
    unknown_settings,
)
from supervisor.store import schema


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_the_defaults_are_those_of_the_contract() -> None:
    settings = load_settings()
    assert (settings.mongo_uri, settings.mongo_db, settings.mongo_collection) == ("", "job_db", "jobs")
    assert settings.data_dir == Path(".supervisor")
    assert settings.workers == os.cpu_count()
    assert (settings.queues, settings.start_method, settings.preload) == ((), "warm", ())
    assert settings.roots == (Path.cwd(),)
    assert (settings.memory_budget, settings.memory_check_interval) == (None, 0.1)
    assert (settings.lease_seconds, settings.poll_interval, settings.default_timeout) == (30, 5, None)
    assert (settings.kill_grace, settings.shutdown_timeout, settings.log_limit) == (5, 30, 16)
    assert (settings.log_format, settings.log_level, settings.retention_days) == ("text", "info", 0)
    assert (settings.metrics_host, settings.metrics_port) == ("127.0.0.1", 9108)


def test_the_environment_comes_before_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("settings.env").write_text("SUPERVISOR_WORKERS=3\nSUPERVISOR_MONGO_DB=from_file\n")
    monkeypatch.setenv("SUPERVISOR_WORKERS", "5")
    settings = load_settings()
    assert (settings.workers, settings.mongo_db) == (5, "from_file")


def test_another_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "other.env"
    other.write_text('SUPERVISOR_QUEUES="red, blue,"\n')
    Path("settings.env").write_text("SUPERVISOR_WORKERS=3\n")
    monkeypatch.setenv("SUPERVISOR_ENV_FILE", str(other))
    settings = load_settings()
    assert settings.queues == ("red", "blue")
    assert settings.workers == os.cpu_count()


def test_an_empty_value_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPERVISOR_WORKERS", "")
    assert load_settings().workers == os.cpu_count()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORKERS", "0"),
        ("WORKERS", "1.5"),
        ("MONGO_URI", "http://localhost"),
        ("START_METHOD", "hot"),
        ("MEMORY_BUDGET", "-1"),
        ("MEMORY_BUDGET", "9" * 30),
        ("DEFAULT_TIMEOUT", "inf"),
        ("DEFAULT_TIMEOUT", "nan"),
        *(("MONGO_DB", name) for name in ("a b", "a.b", "$x", "a/b", 'a"b', "ä" * 32, "\udcff")),
        *(("MONGO_COLLECTION", name) for name in ("$x", "a..b", ".a", "a.", "system.x", "a" * 250, "\udcff")),
        *(("MONGO_COLLECTION", name) for name in OWN_COLLECTIONS),
        ("MEMORY_CHECK_INTERVAL", "0"),
        ("LEASE_SECONDS", "0"),
        ("LEASE_SECONDS", "nan"),
        ("KILL_GRACE", "-1"),
        ("LOG_LIMIT", "0"),
        ("LOG_FORMAT", "xml"),
        ("METRICS_PORT", "65536"),
        ("RETENTION_DAYS", "-1"),
    ],
)
def test_a_wrong_value_names_its_setting(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(PREFIX + name, value)
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert caught.value.setting == name
    assert PREFIX + name in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("setting", ["mongo_db", "mongo_collection"])
def test_names_hold_no_nul(setting: str) -> None:
    Path("settings.env").write_bytes(f"SUPERVISOR_{setting.upper()}=a\0b\n".encode())
    with pytest.raises(ConfigurationError, match=rf"SUPERVISOR_{setting.upper()}: must be a name without '\\x00'"):
        load_settings()


@pytest.mark.parametrize("line", ["SUPERVISOR_QUEUES", "SUPERVISOR_QUEUES 3", "-", 'SUPERVISOR_QUEUES="a', "= 3"])
def test_a_line_of_the_file_that_is_no_setting_is_named(line: str) -> None:
    Path("settings.env").write_text(f"# comment\n\nexport SUPERVISOR_WORKERS=3\n\n{line}\nSUPERVISOR_PRELOAD=a\n")
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert str(caught.value) == "SUPERVISOR_ENV_FILE: settings.env:5: is not of the form NAME=VALUE"


def test_a_file_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPERVISOR_ENV_FILE", "/proc/self/mem")
    with pytest.raises(ConfigurationError, match="SUPERVISOR_ENV_FILE: /proc/self/mem: "):
        load_settings()


def test_names_that_mongodb_takes_are_taken() -> None:
    settings = load_settings(mongo_db="d" * 63, mongo_collection="jobs.of-ours_2 ä")
    assert settings.mongo_collection == "jobs.of-ours_2 ä"


def test_the_collections_beside_the_jobs_are_known() -> None:
    assert OWN_COLLECTIONS == (schema.OUTPUT_COLLECTION, schema.SUPERVISORS_COLLECTION)


def test_what_only_a_supervisor_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPERVISOR_TASK_ROOTS", "/no/such/directory")
    settings = load_settings()  # the commands do not care
    with pytest.raises(ConfigurationError, match="SUPERVISOR_TASK_ROOTS"):
        check_for_supervising(settings)


@pytest.mark.parametrize("root", ["~nosuchuser/x", "a\0b", "loop", "x" * 5000])
def test_a_task_root_that_cannot_be_looked_up(root: str) -> None:
    Path("loop").symlink_to("loop")
    with pytest.raises(ConfigurationError, match="SUPERVISOR_TASK_ROOTS"):
        check_for_supervising(load_settings(task_roots=(root,)))


def test_the_interpreter_is_asked_whether_it_is_one(tmp_path: Path) -> None:
    check_interpreter(sys.executable)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o700)
    check_interpreter(str(python))
    for other in ("/bin/ls", "/bin/echo", str(tmp_path), "/nonexistent", "x\0y"):
        with pytest.raises(ConfigurationError, match="SUPERVISOR_PYTHON"):
            check_interpreter(other)


def test_an_interpreter_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supervisor.settings.INTERPRETER_SECONDS", 0.1)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    python.chmod(0o700)
    with pytest.raises(ConfigurationError, match=r"did not answer within 0\.1 s"):
        check_interpreter(str(python))


def test_typing_errors_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("settings.env").write_text("export SUPERVISOR_WORKER=3\n# SUPERVISOR_COMMENT=1\nSUPERVISOR_QUEUES=a\n")
    monkeypatch.setenv("SUPERVISOR_LEASE", "3")
    monkeypatch.setenv("supervisor_queue", "3")
    monkeypatch.setenv("supervisor_queues", "b")
    assert unknown_settings() == ["SUPERVISOR_LEASE", "SUPERVISOR_WORKER", "supervisor_queue"]


@pytest.mark.parametrize(
    "uri",
    [
        "mongodb://user:secret@host/",
        "mongodb+srv://user:secret@host/db?x=y",
        "cannot reach mongodb://user:sec@ret@host:1/ now",
        "mongodb://user:secret@a,b,c/ and mongodb://other:secret@d/",
    ],
)
def test_secrets_are_masked(uri: str) -> None:
    assert "sec" not in masked(uri)
    assert "***@" in masked(uri)


@pytest.mark.parametrize(
    "option",
    [
        "authMechanismProperties=AWS_SESSION_TOKEN:S3cret",
        "authmechanismproperties=AWS_SESSION_TOKEN:S3cret,SERVICE_NAME:S3cret",
        "tlsCertificateKeyFilePassword=S3cret",
        "ssl_pem_passphrase=S3cret",
        "proxyPassword=S3cret",
    ],
)
def test_secret_options_are_masked(option: str) -> None:
    name = option.partition("=")[0]
    assert masked(f"at mongodb://host/?w=1&{option}&tls=true now") == f"at mongodb://host/?w=1&{name}=***&tls=true now"
    assert masked(f"mongodb://host/?{option}") == f"mongodb://host/?{name}=***"
