"""A script before it runs: its source compiled, its `__main__`, and the streams it prints to."""

from __future__ import annotations

import _io
import os
import sys
from types import CodeType, ModuleType
from typing import Any

_SourceFileLoader: Any = sys.modules["_frozen_importlib_external"].SourceFileLoader


class Text:
    """Stands in for stderr while the source is compiled: warnings count only if it compiles."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def write(self, text: str) -> None:
        self.parts.append(text)

    def flush(self) -> None:
        pass


def load(path: str) -> tuple[CodeType, str]:
    """The compiled script, and the directory it is in with all links followed. Raises what compile() raises."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        directory = os.path.dirname(_real_path(descriptor, path))
        source = _read(descriptor)
    finally:
        os.close(descriptor)
    if not source.isascii():
        source.decode()  # the interpreter refuses what compile() lets pass in comments
    stderr, text = sys.stderr, Text()
    sys.stderr = text
    try:
        code = compile(source, path, "exec", dont_inherit=True)
    finally:
        sys.stderr = stderr
    if text.parts:
        stderr.write("".join(text.parts))
    return code, directory


def _real_path(descriptor: int, path: str) -> str:
    try:
        real = os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return os.path.realpath(path)
    return os.path.realpath(path) if real.endswith(" (deleted)") else real


def _read(descriptor: int) -> bytes:
    size = os.fstat(descriptor).st_size
    source = os.read(descriptor, size + 1)
    while len(source) < size and (more := os.read(descriptor, size)):
        source += more
    return source


def new_main(path: str) -> ModuleType:
    """A fresh `__main__` as the interpreter makes it, in sys.modules behind everything preloaded."""
    main = ModuleType("__main__")
    namespace = main.__dict__
    namespace["__loader__"] = _SourceFileLoader("__main__", path)
    namespace["__annotations__"] = {}
    namespace["__builtins__"] = sys.modules["builtins"]
    namespace["__file__"] = path
    namespace["__cached__"] = None
    sys.modules.pop("__main__", None)
    sys.modules["__main__"] = main
    return main


def standard_stream(descriptor: int, name: str, encoding: str, errors: str) -> _io.TextIOWrapper:
    """sys.stdout or sys.stderr as the interpreter opens them."""
    buffer: Any = _io.open(descriptor, "wb", closefd=False)
    buffer.raw.name = f"<{name}>"
    stream = _io.TextIOWrapper(buffer, encoding, errors, "\n", line_buffering=name == "stderr")
    stream.mode = "w"  # type: ignore[misc]
    return stream
