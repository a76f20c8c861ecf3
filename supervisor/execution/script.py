"""A script before it runs: its source compiled, its `__main__`, and the streams it prints to."""

from __future__ import annotations

import _io
import os
import sys
import time
from dataclasses import dataclass
from types import CodeType, ModuleType
from typing import Any

MAX_KEPT_BYTES = 1_000_000
SETTLED_NS = 2_000_000_000
"""A file changed this recently may change again without a new modification time."""
SourceFileLoader: Any = sys.modules["_frozen_importlib_external"].SourceFileLoader


class Text:
    """Stands in for stderr while the source is compiled: warnings count only if it compiles."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def write(self, text: str) -> None:
        self.parts.append(text)

    def flush(self) -> None:
        pass


@dataclass(slots=True)
class _Compiled:
    """The script that was asked for last, and its code once it was asked for twice."""

    key: tuple[object, ...] | None = None
    code: CodeType | None = None
    refused: bool = False


_compiled = _Compiled()


def compiled(path: str, directory: str) -> CodeType | None:
    """In the runner: a script that runs again and again is compiled once. `directory` is where it was found.

    None for one that does not compile without a word, or was changed a moment ago: it is left to each child.
    """
    key = _key(path, directory)
    if key is None or key != _compiled.key:
        _compiled.key, _compiled.code, _compiled.refused = key, None, False
        return None
    if _compiled.code is None and not _compiled.refused:
        try:
            code, found_in, text = _compile(path)
        except (OSError, SyntaxError, ValueError, MemoryError, RecursionError, OverflowError):
            _compiled.refused = True
            return None
        if text or found_in != directory:
            _compiled.refused = True
        else:
            _compiled.code = code
    return _compiled.code


def kept(path: str, directory: str) -> CodeType | None:
    """The compiled script, where the file is still the one that was compiled."""
    if _compiled.code is None or _compiled.key != _key(path, directory):
        return None
    return _compiled.code


def _key(path: str, directory: str) -> tuple[object, ...] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    if found.st_size > MAX_KEPT_BYTES or time.time_ns() - found.st_mtime_ns < SETTLED_NS:
        return None
    # By its directory, too: two releases may share the file itself by a hard link.
    return path, directory, found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def load(path: str) -> tuple[CodeType, str]:
    """The compiled script, and the directory it is in with all links followed. Raises what compile() raises."""
    code, directory, text = _compile(path)
    if text:
        sys.stderr.write(text)
    return code, directory


def _compile(path: str) -> tuple[CodeType, str, str]:
    """The same, with what the compiler has to say."""
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
    return code, directory, "".join(text.parts)


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
    namespace["__loader__"] = SourceFileLoader("__main__", path)
    namespace["__annotations__"] = {}
    namespace["__builtins__"] = sys.modules["builtins"]
    namespace["__file__"] = path
    namespace["__cached__"] = None
    sys.modules.pop("__main__", None)
    sys.modules["__main__"] = main
    return main


def standard_stream(descriptor: int, name: str, encoding: str, errors: str) -> _io.TextIOWrapper:
    """sys.stdout or sys.stderr as the interpreter opens them."""
    direct = bool(os.environ.get("PYTHONUNBUFFERED"))  # as many containers set it
    buffer: Any = _io.open(descriptor, "wb", 0 if direct else -1, closefd=False)
    (buffer if direct else buffer.raw).name = f"<{name}>"
    by_line = name == "stderr" and not direct
    stream = _io.TextIOWrapper(buffer, encoding, errors, "\n", line_buffering=by_line, write_through=direct)
    stream.mode = "w"  # type: ignore[misc]
    return stream
