"""MongoDB behind TLS: a server certificate of an authority of ours, and what its absence looks like."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from supervisor import JobManager
from tests.security.certificates import Authority, why_not
from tests.security.conftest import PASSWORDS, add_users, without_secrets
from tests.support.commands import Answer, Commands
from tests.support.mongod import TcpServer
from tests.support.running import Jobs, free_port, running_supervisor

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Authority]:
    """The right one, and one that nobody trusts."""
    directory = tmp_path_factory.mktemp("certificates")
    return Authority(directory, "right"), Authority(directory, "wrong")


@pytest.fixture(scope="module")
def server(authorities: tuple[Authority, Authority]) -> Iterator[TcpServer]:
    right, _ = authorities
    with TcpServer(users=True, tls=(right.issue("server"), right.certificate)) as server:
        yield server


@pytest.fixture
def db_name(server: TcpServer) -> str:
    name = f"test_{uuid.uuid4().hex[:12]}"
    add_users(server.uri, name)
    return name


def test_a_job_goes_through_with_tls_and_a_password(server: TcpServer, db_name: str, tmp_path: Path) -> None:
    uri = server.uri_of("supervisor", PASSWORDS["supervisor"], source=db_name)
    with (
        JobManager(server.uri, db_name) as admin,
        running_supervisor(tmp_path, uri, db_name, poll_interval=600) as supervisor,
    ):
        supervisor.wait_idle(2)
        jobs = Jobs(tmp_path, admin)
        assert jobs.run("print('hello')")["status"] == "completed"
        assert Commands(server.uri, db_name, tmp_path)("doctor").code == 0
        assert " WARNING " not in without_secrets(supervisor.log())


def test_a_server_of_another_authority_is_not_trusted(
    server: TcpServer, db_name: str, authorities: tuple[Authority, Authority], tmp_path: Path
) -> None:
    right, wrong = authorities
    uri = server.uri.replace(quote(str(right.certificate), safe=""), quote(str(wrong.certificate), safe=""))
    answer = Commands(uri, db_name, tmp_path)("status")
    _assert_one_clear_line(answer, 3, "CERTIFICATE_VERIFY_FAILED")


def test_without_tls_there_is_no_answer(server: TcpServer, db_name: str, tmp_path: Path) -> None:
    uri = server.uri.partition("&tls=true")[0]
    _assert_one_clear_line(Commands(uri, db_name, tmp_path)("status"), 3, "closed")


def test_tls_to_a_server_without_it(mongo_uri: str, db_name: str, tmp_path: Path) -> None:
    separator = "&" if "?" in mongo_uri else "?"
    answer = Commands(f"{mongo_uri}{separator}tls=true", db_name, tmp_path)("status")
    assert answer.code == 3 and answer.err.count("\n") == 1, answer


def test_a_missing_file_of_the_authority_is_a_wrong_setting(server: TcpServer, db_name: str, tmp_path: Path) -> None:
    uri = server.uri.partition("&tlsCAFile=")[0] + "&tlsCAFile=/nowhere/ca.pem"
    for command in (["status"], ["run"]):
        _assert_one_clear_line(Commands(uri, db_name, tmp_path)(*command), 2, "SUPERVISOR_MONGO_URI")


def test_a_client_certificate_whose_key_has_a_password(
    server: TcpServer, db_name: str, authorities: tuple[Authority, Authority], tmp_path: Path
) -> None:
    """The password of a key is a secret, too."""
    key = authorities[0].issue("client")
    options = f"&tlsCertificateKeyFile={quote(str(key), safe='')}&tlsCertificateKeyFilePassword=s3cretkey"
    commands = Commands(server.uri + options, db_name, tmp_path)
    commands.environment["SUPERVISOR_METRICS_PORT"] = str(free_port())
    doctor = commands("doctor")
    assert doctor.code == 0 and "s3cretkey" not in doctor.out + doctor.err
    nowhere = (server.uri + options).replace(server.address, "127.0.0.1:1")
    answer = commands("status", environment={"SUPERVISOR_MONGO_URI": nowhere})
    assert answer.code == 3 and "s3cretkey" not in answer.err


def _assert_one_clear_line(answer: Answer, code: int, words: str) -> None:
    assert answer.code == code, answer
    assert answer.out == ""
    assert answer.err.startswith("error: ") and answer.err.count("\n") == 1, answer.err
    assert words in answer.err, answer.err
    assert len(answer.err) < 400, answer.err
    without_secrets(answer.err)
