"""What `ps` shows of a process: its command line and environment as the kernel keeps them.

A forked job would show the warm interpreter's. Linux lets a process move the two areas (PR_SET_MM_MAP); where it
does not, the old area is overwritten, as much as fits. Only looks depend on this: every failure is silent.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

_PR_SET_MM = 35
_PR_SET_MM_MAP = 14
_AREA_BYTES = 4096


class _MemoryMap(ctypes.Structure):
    """struct prctl_mm_map, see prctl(2)."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in (
            "start_code", "end_code", "start_data", "end_data", "start_brk", "brk", "start_stack",
            "arg_start", "arg_end", "env_start", "env_end", "auxv",
        )),
        ("auxv_size", ctypes.c_uint32),
        ("exe_fd", ctypes.c_uint32),
    ]  # fmt: skip


class ProcessTitle:
    """Found out once, in the process whose children will set it."""

    def __init__(self, memory: _MemoryMap, environment: dict[str, str]) -> None:
        self._memory = memory
        self._environment = _environment_block(environment)
        self._old_area = memory.arg_start, memory.arg_end
        self._old_title = ctypes.string_at(memory.arg_start, memory.arg_end - memory.arg_start)
        self._original = memory.arg_start, memory.arg_end, memory.env_start, memory.env_end
        self._libc: Any = ctypes.CDLL(None)
        self._prctl = self._libc.prctl
        self._sbrk = self._libc.sbrk
        self._sbrk.restype = ctypes.c_void_p
        self._arguments = (
            ctypes.c_int(_PR_SET_MM),
            ctypes.c_ulong(_PR_SET_MM_MAP),
            ctypes.byref(memory),
            ctypes.c_ulong(ctypes.sizeof(memory)),
            ctypes.c_ulong(0),
        )
        self._area: Any = None

    @classmethod
    def of_this_process(cls, environment: dict[str, str]) -> ProcessTitle | None:
        """`environment` is what jobs add theirs to. None where the kernel does not say where arguments are kept."""
        if sys.platform != "linux":
            return None
        try:
            with open("/proc/self/stat", "rb") as file:
                content = file.read()
        except OSError:
            return None
        # Fields are counted from 1 in proc(5); the name, field 2, may hold spaces and parentheses.
        fields = content[content.rindex(b")") + 2 :].split()
        code, data, arguments = fields[23:25], fields[42:44], fields[45:49]
        start_code, end_code, start_data, end_data, brk, arg_start, arg_end, env_start, env_end = map(
            int, (*code, *data, fields[44], *arguments)
        )
        if not arg_start:
            return None
        return cls(_MemoryMap(
            start_code, end_code, start_data, end_data, brk, 0, int(fields[25]),
            arg_start, arg_end, env_start, env_end, 0, 0, 0xFFFF_FFFF,
        ), environment)  # fmt: skip

    def set(self, arguments: list[str], environment: dict[str, str], *, adds: bool) -> None:
        """Shows these; the environment is complete, or `adds` to that of the start. Undecodable bytes travel as in
        `os.fsencode`."""
        title = _block(arguments)
        block = title + (self._environment if adds else b"") + _environment_block(environment)
        memory = self._memory
        # It lives as long as the process. ctypes makes a type for each size, on ten pages: there are to be few.
        self._area = ctypes.create_string_buffer(block, -(-len(block) // _AREA_BYTES) * _AREA_BYTES)
        address = ctypes.addressof(self._area)
        memory.brk = self._sbrk(0)
        memory.arg_start = address
        memory.arg_end = memory.env_start = address + len(title)
        memory.env_end = address + len(block)
        if self._prctl(*self._arguments) != 0:
            start, end = self._old_area
            size = end - start
            ctypes.memmove(start, title[: size - 1].ljust(size, b"\0"), size)

    def restore(self) -> None:
        """Shows again what the process was started with."""
        memory = self._memory
        memory.brk = self._sbrk(0)
        memory.arg_start, memory.arg_end, memory.env_start, memory.env_end = self._original
        if self._prctl(*self._arguments) != 0:
            start, _ = self._old_area
            ctypes.memmove(start, self._old_title, len(self._old_title))


def _environment_block(environment: dict[str, str]) -> bytes:
    return _block([f"{name}={value}" for name, value in environment.items()]) if environment else b""


def _block(strings: list[str]) -> bytes:
    return ("\0".join(strings) + "\0").encode(sys.getfilesystemencoding(), "surrogateescape")
