"""A MongoDB that asks everybody who they are, with the roles of a deployment, and a supervisor on it."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from pymongo import MongoClient

from supervisor.store.roles import role_commands
from tests.support.mongod import TcpServer

USERS = ("producer", "operator", "reader", "supervisor")
PASSWORDS = {name: f"secret/of+{uuid.uuid4().hex}@{uuid.uuid4().hex}" for name in USERS}
"""With characters that must be escaped in a URI."""


@dataclass(frozen=True)
class Guarded:
    """A database whose users have one role each, named as the role."""

    server: TcpServer
    db_name: str

    def uri(self, user: str) -> str:
        return self.server.uri_of(user, PASSWORDS[user], source=self.db_name)


def add_users(uri: str, db_name: str) -> None:
    """The roles, and a user of each."""
    with MongoClient[dict[str, Any]](uri) as client:
        for command in role_commands(db_name):
            client[db_name].command(command)
        for name, password in PASSWORDS.items():
            client[db_name].command("createUser", name, pwd=password, roles=[name])


@pytest.fixture(scope="module")
def guarded_server() -> Iterator[TcpServer]:
    with TcpServer(users=True) as server:
        yield server


@pytest.fixture
def guarded(guarded_server: TcpServer) -> Guarded:
    """An empty database with the roles and users."""
    db_name = f"test_{uuid.uuid4().hex[:12]}"
    add_users(guarded_server.uri, db_name)
    return Guarded(guarded_server, db_name)


def without_secrets(text: str) -> str:
    """The text, once it is sure that no part of a password is in it, escaped or not."""
    parts = [part for password in (*PASSWORDS.values(), TcpServer.ADMIN[1]) for part in re.split("[@+/]", password)]
    for part in (*parts, "secret%2F"):
        assert len(part) < 6 or part not in text, f"a secret is in: {text}"
    return text
