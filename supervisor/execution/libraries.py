"""Whether the C library's exit() has anything to do for the shared libraries of a process.

Running the destructors of all libraries that numpy and pandas bring takes longer than all the rest of a short job:
each touches pages of its own. They are left out only where it is known that no destructor does anything outside of
the process, and no library was loaded since.
"""

from __future__ import annotations

import ctypes
import os
import re
from typing import Any

_RTLD_DI_LINKMAP = 2
_HARMLESS = re.compile(
    # the interpreter and its own modules; the system's libraries that those need; packages looked into
    r"|linux-vdso.*|.*/ld-linux.*|.*/lib-dynload/[^/]*|.*/libpython3[^/]*|.*/(numpy|numpy\.libs|pandas|psutil)/.*"
    r"|.*/lib(c|m|dl|pthread|util|rt|z|ffi|crypto|ssl|lzma|bz2|expat|uuid|gcc_s|stdc\+\+|crypt|tinfow?|ncursesw?"
    r"|readline|sqlite3|nss_\w+|resolv|atomic)[.-][^/]*"
)


class _LinkMap(ctypes.Structure):
    """The public part of struct link_map, see dlinfo(3)."""


_LinkMap._fields_ = [
    ("address", ctypes.c_void_p),
    ("name", ctypes.c_char_p),
    ("dynamic", ctypes.c_void_p),
    ("next", ctypes.POINTER(_LinkMap)),
    ("previous", ctypes.c_void_p),
]


class Libraries:
    """The shared libraries loaded at one moment."""

    def __init__(self, names: list[str], last: Any) -> None:
        self.unknown = [name for name in names if not _HARMLESS.fullmatch(name)]
        next_one = ctypes.c_void_p.from_address(ctypes.addressof(last) + _LinkMap.next.offset)
        self._next = memoryview(next_one).cast("B")  # unlike an object of ctypes, it is read without a page to copy

    @classmethod
    def of_this_process(cls) -> Libraries | None:
        """None where the dynamic linker does not say."""
        this = ctypes.CDLL(None)
        if not hasattr(this, "dlinfo"):
            return None
        library = ctypes.POINTER(_LinkMap)()
        if this.dlinfo(ctypes.c_void_p(this._handle), _RTLD_DI_LINKMAP, ctypes.byref(library)) != 0 or not library:
            return None
        names = []
        while True:
            names.append(os.fsdecode(library.contents.name or b""))
            if not library.contents.next:
                return cls(names, library.contents)
            library = library.contents.next

    def can_be_left_alone(self) -> bool:
        """Whether the process may end without their destructors."""
        return not self.unknown and not any(self._next)
