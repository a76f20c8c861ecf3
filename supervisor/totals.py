"""A piece of memory for the numbers that must not begin at 0 again when the keeper is replaced.

Made by the supervisor before it forks, and inherited by every keeper. What is written last counts: a keeper that is
killed while it writes leaves the older copy, which a checksum tells from a broken one.
"""

from __future__ import annotations

import os
import zlib

from supervisor.messages import unnamed_file

_HEADER_BYTES = 24
_COPY_BYTES = 1 << 20


class Totals:
    """Two copies of what was kept, of which the newer one that is whole counts."""

    def __init__(self) -> None:
        with unnamed_file() as file:
            self._descriptor = os.dup(file.fileno())
        self._serial = 0

    def fileno(self) -> int:
        return self._descriptor

    def keep(self, data: bytes) -> None:
        """Remembers `data`, at most 1 MB less some bytes, instead of what was kept before."""
        if len(data) > _COPY_BYTES - _HEADER_BYTES:
            return
        self._serial += 1
        numbers = (self._serial, len(data), zlib.crc32(data))
        header = b"".join(number.to_bytes(8, "big") for number in numbers)
        os.pwrite(self._descriptor, header + data, self._serial % 2 * _COPY_BYTES)

    def kept(self) -> bytes | None:
        """What was kept last, also by another process; None when nothing was."""
        newest: bytes | None = None
        for offset in (0, _COPY_BYTES):
            header = os.pread(self._descriptor, _HEADER_BYTES, offset)
            serial, length, checksum = (int.from_bytes(header[at : at + 8], "big") for at in (0, 8, 16))
            data = os.pread(self._descriptor, length, offset + _HEADER_BYTES)
            if serial > self._serial and len(data) == length and zlib.crc32(data) == checksum:
                newest, self._serial = data, serial
        return newest
