"""What systemd hears."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from supervisor.systemd import notify


@pytest.mark.parametrize("abstract", [False, True])
def test_the_state_arrives(tmp_path: Path, abstract: bool) -> None:
    name = f"notify-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("\0" + name if abstract else name)
        assert notify("READY=1\nSTATUS=üp", environ={"NOTIFY_SOCKET": "@" + name if abstract else name})
        assert systemd.recv(100).decode() == "READY=1\nSTATUS=üp"


@pytest.mark.parametrize("address", [None, "", "vsock:2:1", "/nowhere/notify"])
def test_without_systemd_nothing_happens(address: str | None) -> None:
    assert not notify("READY=1", environ={} if address is None else {"NOTIFY_SOCKET": address})


def test_a_full_queue_does_not_block(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(path)
        sent: list[bool] = []
        environ = {"NOTIFY_SOCKET": path}
        sender = threading.Thread(
            target=lambda: sent.extend(notify("WATCHDOG=1", environ=environ) for _ in range(2000)), daemon=True
        )
        sender.start()
        sender.join(10)
        assert len(sent) == 2000, "blocked"
    assert not sent[-1]
