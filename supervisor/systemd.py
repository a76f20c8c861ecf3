"""What systemd wants to hear from a service of `Type=notify`: sd_notify(3), without a library.

systemd tells the address in `NOTIFY_SOCKET`; without it, or when it does not listen, nothing happens.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


def notify(state: str, *, environ: Mapping[str, str] = os.environ) -> bool:
    """Sends e.g. `READY=1`, `WATCHDOG=1`, `STOPPING=1` or `STATUS=4 of 8 workers busy` (newlines separate
    several). Never blocks and never fails; returns whether it was sent."""
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):  # a socket without a file, in Linux' abstract namespace
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        try:
            sock.sendto(state.encode(), address)
        except OSError:
            return False
    return True
