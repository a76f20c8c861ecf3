"""Ends the process of a script that ran in a warm interpreter, like the interpreter does.

The full finalization of a warm interpreter takes 4 to 30 ms, because it takes apart everything preloaded. Here its
steps that a script can observe are done in its order: threads joined, atexit, streams flushed, `__main__` and the
modules that the job imported freed, what is still open flushed, libc's exit(). The process ends in `_end`, always.

What remains different from `python script.py`; `start_method: exec` avoids each of these:

    frames                inspect.stack() and traceback.print_stack() show two outer frames, the recursion limit is
                          reached two calls earlier, warnings.warn(stacklevel=2) at top level names warm.py, not sys:1
    sys.modules           preloaded modules are there before they are imported, and as old as the warm interpreter;
                          filters that they added to `warnings` are in force
    hash(), id()          the hash seed and the address layout are the same in all jobs of one warm interpreter
    gc                    gc.get_freeze_count() is not 0; gc.get_objects() does not list what was preloaded
    finalization          sys.is_finalizing() stays false: threads and forks started in atexit handlers work in
                          Python 3.12 too, and daemon threads may run a moment longer; objects that live in preloaded
                          modules are flushed, but their __del__ is not called; warnings issued while freeing, and
                          atexit handlers that fail in C code, name a line of this file
    SIGRTMAX - 1          writes the threads' tracebacks to stderr instead of ending the process
    C library             handlers that a script registers with on_exit() through ctypes are not called, unless it
                          has loaded a shared library
    ru_maxrss             starts at what the warm interpreter uses
"""

from __future__ import annotations

import _io
import _signal
import _thread
import atexit
import contextlib
import ctypes
import gc
import os
import sys
from os import _exit as end_process
from types import ModuleType, SimpleNamespace, TracebackType
from typing import Any, NoReturn

from supervisor.execution.libraries import Libraries
from supervisor.execution.script import SourceFileLoader, Text

FLUSH_FAILED_EXIT_CODE = 120
_exit: Any = ctypes.PyDLL(None).exit  # with the GIL held: no thread runs Python code any more
_fflush: Any = ctypes.PyDLL(None).fflush
_IOBase: Any = _io._IOBase
_INERT = frozenset({type(None), bool, int, float, str, bytes, ModuleType, SourceFileLoader})
"""Types whose objects do nothing when they are freed."""
_GONE_AT_EXIT = ("path", "argv", "last_exc", "last_type", "last_value", "last_traceback", "meta_path")


def end(errors: list[BaseException], libraries: Libraries | None) -> NoReturn:
    """Ends the process as the interpreter does after a script that returned, or that raised the one error.

    The list is emptied: what its traceback refers to is freed before the process ends.
    """
    exit_code, interrupted = 0, False
    if errors:
        error = errors.pop()
        error.__traceback__ = error.__traceback__.tb_next if error.__traceback__ else None  # less the caller's frame
        interrupted = type(error) is KeyboardInterrupt
        exit_code = _report(error)
        del error
    _end(exit_code, interrupted, libraries)


def _report(error: BaseException) -> int:
    """Does what PyErr_Print does with an exception that nobody caught; returns the exit code."""
    if isinstance(error, SystemExit):
        return _exit_code(error)
    traceback = error.__traceback__
    if sys.version_info >= (3, 12):
        sys.last_exc = error
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, traceback
    hook = getattr(sys, "excepthook", None)
    if hook is None:
        _write_stderr("sys.excepthook is missing\n")
        sys.__excepthook__(type(error), error, traceback)
        return 1
    failure = None
    try:
        hook(type(error), error, traceback)
    except BaseException as caught:
        failure = caught
    if isinstance(failure, SystemExit):
        return _exit_code(failure)
    if failure is not None:
        _write_stderr("Error in sys.excepthook:\n")
        _display(failure)
        _write_stderr("\nOriginal exception was:\n")
        sys.__excepthook__(type(error), error, traceback)
    return 1


def _display(error: BaseException) -> None:
    traceback = error.__traceback__
    error.__traceback__ = traceback = traceback.tb_next if traceback else None
    sys.__excepthook__(type(error), error, traceback)


def _exit_code(request: SystemExit) -> int:
    value: object = request
    with contextlib.suppress(BaseException):
        value = request.code
    if value is None:
        return 0
    try:
        if isinstance(value, int):
            return value & 0xFF if -(2**63) <= value < 2**63 else _refused_exit_code()
        text = str(value)
    except BaseException as error:
        error.__traceback__ = error.__traceback__.tb_next if error.__traceback__ else None
        _write_stderr("\n")
        _forgotten(error)
        return 1
    _write_stderr(text)
    _write_stderr("\n")
    return 1


def _refused_exit_code() -> int:
    _forgotten(OverflowError("Python int too large to convert to C long"))
    return 0xFF


def _forgotten(error: BaseException) -> None:
    """From 3.12 on, the interpreter forgets to clear an error of the exit code itself, and shows it later."""
    if sys.version_info >= (3, 12):
        if sys.version_info >= (3, 13):
            _write_stderr("Exception ignored on threading shutdown:\n")
        sys.__excepthook__(type(error), error, error.__traceback__)


def _write_stderr(text: str) -> None:
    """To sys.stderr, to descriptor 2 where there is none."""
    try:
        sys.stderr.write(text)
    except BaseException:
        os.write(2, text.encode(errors="backslashreplace"))


def _end(exit_code: int, interrupted: bool, libraries: Libraries | None) -> NoReturn:
    only_output_may_be_left = not _thread._count() and not _has_exit_handlers() and _prints_as_at_the_start()
    if not only_output_may_be_left:
        _join_threads()
        atexit._run_exitfuncs()
    if not _flush_streams():
        exit_code = FLUSH_FAILED_EXIT_CODE
    if not _only_output_was_left():
        if only_output_may_be_left:
            _join_threads()
        _drop_signal_handlers()
        _free_modules()
        _flush(sys.stdout)
        _flush(sys.stderr)
    if interrupted:
        os.kill(os.getpid(), _signal.SIGINT)
    if libraries is not None and libraries.can_be_left_alone():
        _fflush(None)
        end_process(exit_code & 0xFF)
    _exit(exit_code)
    raise AssertionError("exit() returned")


def _has_exit_handlers() -> bool:
    threading: Any = sys.modules.get("threading")
    return atexit._ncallbacks() > 0 or (threading is not None and threading._threading_atexits != [])


def _join_threads() -> None:
    threading: Any = sys.modules.get("threading")
    if threading is not None:
        try:
            threading._shutdown()
        except BaseException as error:
            error.__traceback__ = error.__traceback__.tb_next if error.__traceback__ else None
            _ignored(error, threading, "Exception ignored on threading shutdown")


def _prints_as_at_the_start() -> bool:
    stdout, stderr = getattr(sys, "stdout", None), getattr(sys, "stderr", None)
    return stdout is not None and stdout is sys.__stdout__ and stderr is not None and stderr is sys.__stderr__


def _only_output_was_left() -> bool:
    """Whether the script was so simple that nothing can notice the rest of its end: no thread, and no object that does
    anything when it is freed. All objects that were there before its `__main__` are frozen."""
    objects = gc.get_objects()
    if len(objects) != 3 or _thread._count() or not _prints_as_at_the_start():
        return False
    main = sys.modules.get("__main__")
    if type(main) is not ModuleType:
        return False
    for found in objects:  # these are the module, its namespace and its loader
        if found is main:
            break
    else:
        return False
    for value in main.__dict__.values():
        if type(value) not in _INERT and (type(value) is not dict or value):
            return False
    return True


def _drop_signal_handlers() -> None:
    for number in range(1, _signal.NSIG):
        if callable(_signal.getsignal(number)):
            try:
                _signal.signal(number, _signal.SIG_DFL)
            except BaseException as error:  # of a handler whose signal came just now
                _ignored(error, None, "Exception ignored in signal handler")


def _flush_streams() -> bool:
    """Whether what was printed has arrived. A broken stderr counts, but there is nowhere to say so."""
    flushed = True
    stdout = getattr(sys, "stdout", None)
    try:
        if stdout is not None and not getattr(stdout, "closed", False):
            stdout.flush()
    except BaseException as error:
        error.__traceback__ = error.__traceback__.tb_next if error.__traceback__ else None
        _ignored(error, stdout, "Exception ignored on flushing sys.stdout")
        flushed = False
    stderr = getattr(sys, "stderr", None)
    try:
        if stderr is not None and not getattr(stderr, "closed", False):
            stderr.flush()
    except BaseException:
        flushed = False
    return flushed


def _ignored(error: BaseException, source: object, message_313: str) -> None:
    """Does what PyErr_WriteUnraisable does."""
    traceback: TracebackType | None = error.__traceback__
    if sys.unraisablehook is not sys.__unraisablehook__:
        arguments: Any = SimpleNamespace(
            exc_type=type(error), exc_value=error, exc_traceback=traceback, err_msg=None, object=source
        )
        sys.unraisablehook(arguments)
        return
    error.__context__ = error.__cause__ = None
    stderr, text = sys.stderr, Text()
    sys.stderr = text
    sys.__excepthook__(type(error), error, traceback)
    sys.stderr = stderr
    shown = "".join(text.parts)
    if sys.version_info >= (3, 13):
        _write_stderr(f"{message_313}:\n{shown}")
        return
    if not str(error):
        shown = f"{shown.rstrip()}: \n"
    _write_stderr(f"Exception ignored in: {source!r}\n{shown}")


def _free_modules() -> None:
    """Frees `__main__` and what the job imported, then flushes what is still open."""
    if _thread._count() == 0:  # what still runs would stumble over it
        for name in _GONE_AT_EXIT:
            if getattr(sys, name, None) is not None:
                setattr(sys, name, None)
    sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__
    main = sys.modules.get("__main__")
    if main is None:
        return
    namespace_id = id(main.__dict__)
    del main
    gc.collect()
    for name in ("io", *_imported_names()):  # without io no source lines in tracebacks, as in the interpreter
        sys.modules.pop(name, None)
    gc.collect()
    _flush_survivors(namespace_id)


def _imported_names() -> list[str]:
    """`__main__` and what was imported since, in this order; it was put behind everything preloaded."""
    names = []
    for name in reversed(sys.modules):
        names.append(name)
        if name == "__main__":
            break
    return names[::-1]


def _flush_survivors(namespace_id: int) -> None:
    """Empties a `__main__` that something preloaded still refers to, and flushes files left open."""
    objects = gc.get_objects()
    if _thread._count() == 0:
        for found in objects:
            if id(found) == namespace_id and type(found) is dict and found.get("__name__") == "__main__":
                _clear(found)
                break
    open_types = {kind for kind in set(map(type, objects)) if issubclass(kind, _IOBase)}
    if not open_types:
        return
    for text_first in (True, False):
        for found in objects:
            if type(found) in open_types and issubclass(type(found), _io._TextIOBase) is text_first:
                _flush(found)


def _flush(file: Any) -> None:
    try:
        if file is not None and not file.closed:
            if type(file).__module__ == "_io":
                file.flush()
            else:
                file.close()
    except BaseException:  # the interpreter, too, says nothing when it frees a file
        pass


def _clear(namespace: dict[str, Any]) -> None:
    """Sets the names to None in the order of _PyModule_Clear."""
    private = [name for name in namespace if name[:1] == "_" and name[:2] != "__"]
    for name in [*private, *(name for name in namespace if name != "__builtins__")]:
        namespace[name] = None


def rehearse(namespace_id: int, libraries: Libraries | None) -> None:
    """Does what every script's end does."""
    if libraries is not None:
        libraries.can_be_left_alone()
    _has_exit_handlers()
    _only_output_was_left()
    _flush_streams()
    _drop_signal_handlers()
    _imported_names()
    _flush(sys.stdout)
    gc.collect()
    _flush_survivors(namespace_id)
