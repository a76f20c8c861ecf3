"""What a job sees is what `python script.py args` shows it: each script runs both ways, and everything is compared.

Each file of `fidelity/` is one script. It runs once as a process of its own, and as a fork of two warm interpreters:
a bare one, and one that has preloaded modules whose state could leak into jobs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from supervisor.execution.child import Launch, why_not_warm

HERE = Path(__file__).parent
SCRIPTS = HERE / "fidelity"
PRELOADED = [
    "json", "logging", "tempfile", "random", "threading", "warnings", "uuid", "asyncio", "concurrent.futures.process",
    "multiprocessing.pool", "inspect", "traceback", "decimal", "subprocess",
    *(["numpy", "numpy.random"] if importlib.util.find_spec("numpy") else []),
]  # fmt: skip
ENVIRONMENT = {
    "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
    "HOME": "/",
    "LANG": "C.UTF-8",
    "FIDELITY": "ä",
    "REMOVED": "from the job",
}
JOB_ENVIRONMENT = {name: value for name, value in ENVIRONMENT.items() if name != "REMOVED"} | {"JOB_ID": "1"}
DEADLINE_SECONDS = 60.0


@dataclass(frozen=True)
class Case:
    """A script and how it is started. `warm` = whether a fork of the warm interpreter may run it."""

    script: Path
    args: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    warm: bool = True

    def __str__(self) -> str:
        name = str(self.script.relative_to(SCRIPTS)) if SCRIPTS in self.script.parents else self.script.name
        settings = [f"{name}={value}" for name, value in self.env.items()]
        return " ".join([name, *map(ascii, self.args), *settings])[:60]


@dataclass(frozen=True)
class Result:
    """All that one run leaves behind; addresses and process ids are masked."""

    exit_code: int
    stdout: str
    stderr: str
    files: dict[str, bytes]


def fidelity_cases() -> list[Case]:
    cases = [Case(path) for path in sorted(SCRIPTS.glob("*.py"))]
    for name, arguments in {
        "argv.py": ["", "a b", "-x", "--", "ä", "new\nline", "\udcff"],
        "exit_argument.py": [
            "0", "1", "3", "300", "-1", "256", "2**31", "2**70", "-2**70", "True", "False", "''", "'text'",
            "'ä\\udc80'", "1.5", "(1, 2)", "[]", "b'x'", "None", "KeyError('x')",
        ],
        "death_by_signal.py": ["SIGTERM", "SIGKILL", "SIGINT", "SIGSEGV", "SIGHUP", "SIGPIPE", "SIGUSR1"],
        "argparse_usage.py": ["--help", "12"],
    }.items():  # fmt: skip
        cases += [Case(SCRIPTS / name, (argument,)) for argument in arguments]
    cases += [
        Case(SCRIPTS / "argv.py", tuple(str(number) for number in range(3000))),
        Case(SCRIPTS / "command_line.py", ("a b", "", "-c")),
        Case(SCRIPTS / "timezone.py", env={"TZ": "Asia/Tokyo"}),
        Case(SCRIPTS / "tempfile_place.py", env={"TMPDIR": "/var/tmp"}),
        Case(SCRIPTS / "stdout_modes.py", env={"PYTHONUNBUFFERED": "1"}, warm=False),
        Case(SCRIPTS / "stdout_encoding.py", env={"PYTHONIOENCODING": "latin-1:replace"}, warm=False),
        Case(SCRIPTS / "stdout_encoding.py", env={"LC_ALL": "C"}, warm=False),
        Case(SCRIPTS / "locale_settings.py", env={"LC_ALL": "POSIX"}, warm=False),
        Case(SCRIPTS / "interpreter.py", env={"PYTHONOPTIMIZE": "1"}, warm=False),
        Case(SCRIPTS / "interpreter.py", env={"PYTHONDEVMODE": "1"}, warm=False),
        Case(SCRIPTS / "warnings_default.py", env={"PYTHONWARNINGS": "always"}, warm=False),
        Case(SCRIPTS / "known_differences" / "hash_seed.py", env={"PYTHONHASHSEED": "7"}, warm=False),
        Case(SCRIPTS / "syspath.py", env={"PYTHONPATH": "/nowhere"}, warm=False),
        Case(SCRIPTS / "shadowing" / "main.py", warm=False),
        Case(SCRIPTS / "own_supervisor" / "main.py"),
    ]
    return cases


ODD_SOURCES = {
    "empty": b"",
    "no_newline": b"print(1)",
    "crlf": b"print('''a\r\nb''')\r\nx = 1 / 0\r\n",
    "carriage_returns": b"print(1)\rprint(2)\r",
    "form_feed": b"\x0cprint(1)\n",
    "byte_order_mark": b"\xef\xbb\xbfprint('\xc3\xa4')\n",
    "latin_1_cookie": b"# -*- coding: latin-1 -*-\nprint(ascii('\xe4'))\n1 / 0  # \xe4\n",
    "utf_16": "print(1)\n".encode("utf-16"),
    "mark_and_cookie": b"\xef\xbb\xbf# coding: latin-1\nprint(1)\n",
    "unknown_cookie": b"# coding: no-such-encoding\nprint(1)\n",
    "bad_utf_8": b"print(1)\nx = '\xff'\n",
    "bad_utf_8_in_comment": b"print(1)\n# \xff\n",
    "nul": b"print(1)\n\x00\nprint(2)\n",
    "nul_in_string": b"print('a\x00b')\n",
    "syntax_error": b"print('before')\ndef f(:\n    pass\n",
    "syntax_error_late": b"text = '\\d'\nreturn 1\n",
    "indentation_error": b"if True:\nprint(1)\n",
    "tab_error": b"if True:\n        x = 1\n\ty = 2\n",
    "unclosed": b"x = (1,\n",
    "unclosed_string": b"x = '''abc\n",
    "too_nested": b"(" * 300 + b")" * 300 + b"\n",
    "null_statement": b"1 if 2 else 3\n'text'\n",
    "hash_bang": b"#!/usr/bin/env python3 -O\nprint(__file__)\n",
    "pyc_magic": importlib.util.MAGIC_NUMBER + b"\0" * 12 + b"rubbish",
    "zip_magic": b"PK\x03\x04rubbish",
    "walrus_and_match": b"match (x := 3):\n    case 3:\n        print(x)\n",
}


class WarmHost:
    """A process that forks a child for each request; see fidelity_host.py."""

    def __init__(self, preload: list[str]) -> None:
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.settimeout(DEADLINE_SECONDS)
        command = [sys.executable, str(HERE / "fidelity_host.py"), str(theirs.fileno()), ",".join(preload)]
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=ENVIRONMENT,
            )

    def close(self) -> None:
        self._connection.close()
        self._process.wait(DEADLINE_SECONDS)

    def kill(self) -> None:
        self._process.kill()

    def run(
        self, case: Case, cwd: Path, start_method: str = "warm", *, adds: bool = False
    ) -> tuple[int, str | None, bytes, bytes]:
        """Exit code, the reason why it was not warm, stdout and stderr."""
        stdout, stdout_end = os.pipe()
        stderr, stderr_end = os.pipe()
        self.start(case, cwd, stdout_end, stderr_end, start_method=start_method, adds=adds)
        output = read_both(stdout, stderr)
        answer = json.loads(self._connection.recv(65_536))
        return answer[0], answer[1], *output

    def start(self, case: Case, cwd: Path, *outputs: int, start_method: str = "warm", adds: bool = False) -> None:
        """Starts a job with these ends of pipes as stdout and stderr; closes them here."""
        launch = {
            "path": str(case.script),
            "args": case.args,
            "env": case.env if adds else {**JOB_ENVIRONMENT, **case.env},
            "cwd": str(cwd),
            "start_method": start_method,
            "python": sys.executable,
            "adds": adds,
        }
        stdin = os.open(os.devnull, os.O_RDONLY)
        try:
            descriptors = [stdin, outputs[0], outputs[-1]]
            socket.send_fds(self._connection, [json.dumps(launch).encode()], descriptors)
        finally:
            for descriptor in (stdin, *outputs):
                os.close(descriptor)


def read_both(*descriptors: int) -> tuple[bytes, bytes]:
    """Reads two pipes until both are closed."""
    parts: dict[int, list[bytes]] = {descriptor: [] for descriptor in descriptors}
    left = set(descriptors)
    deadline = time.monotonic() + DEADLINE_SECONDS
    try:
        while left:
            readable, _, _ = select.select(left, [], [], max(0.0, deadline - time.monotonic()))
            assert readable, "the script did not end in time"
            for descriptor in readable:
                data = os.read(descriptor, 65_536)
                parts[descriptor].append(data)
                if not data:
                    left.remove(descriptor)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return b"".join(parts[descriptors[0]]), b"".join(parts[descriptors[1]])


@pytest.fixture(scope="module", params=["bare", "preloaded"])
def host(request: pytest.FixtureRequest) -> Iterator[WarmHost]:
    warm_host = WarmHost(PRELOADED if request.param == "preloaded" else [])
    yield warm_host
    warm_host.close()


@pytest.fixture(scope="module")
def bare_host() -> Iterator[WarmHost]:
    warm_host = WarmHost([])
    yield warm_host
    warm_host.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of every run: the same path each time, empty each time."""
    return tmp_path_factory.mktemp("fidelity") / "work"


def clean(place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    return place


def result(exit_code: int, stdout: bytes, stderr: bytes, place: Path) -> Result:
    files = {
        str(path.relative_to(place)): path.read_bytes()
        for path in sorted(place.rglob("*"))
        if path.is_file() and path.suffix not in (".pyc", ".db")
    }
    return Result(exit_code, masked(stdout), masked(stderr), files)


def masked(output: bytes) -> str:
    text = output.decode(errors="surrogateescape")
    text = re.sub(r"\b0x[0-9a-f]+", "0x…", text)
    return re.sub(r"(?<=started )\d+|(?<=Process-)\d{3,}", "…", text)  # thread identifiers, names after a pid


def run_natural(case: Case, place: Path) -> Result:
    """As `python script.py args`."""
    process = subprocess.run(
        [sys.executable, str(case.script), *case.args],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        cwd=clean(place),
        env={**JOB_ENVIRONMENT, **case.env},
        start_new_session=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    return result(process.returncode, process.stdout, process.stderr, place)


natural_results: dict[str, Result] = {}


def natural(case: Case, place: Path) -> Result:
    if str(case) not in natural_results:
        natural_results[str(case)] = run_natural(case, place)
    return natural_results[str(case)]


def run_warm(host: WarmHost, case: Case, place: Path) -> Result:
    exit_code, reason, stdout, stderr = host.run(case, clean(place))
    assert (reason is None) == case.warm, reason
    return result(exit_code, stdout, stderr, place)


@pytest.mark.parametrize("case", fidelity_cases(), ids=str)
def test_a_warm_job_does_what_python_does(case: Case, host: WarmHost, place: Path) -> None:
    assert run_warm(host, case, place) == natural(case, place)


@pytest.mark.parametrize("name", ODD_SOURCES)
def test_odd_sources_are_read_as_python_reads_them(name: str, bare_host: WarmHost, place: Path, tmp_path: Path) -> None:
    script = tmp_path / f"{name}.py"
    script.write_bytes(ODD_SOURCES[name])
    case = Case(script)
    assert run_warm(bare_host, case, place) == run_natural(case, place)


KNOWN_DIFFERENCES = {
    "frames.py": True,
    "recursion_depth.py": True,
    "warning_above_top_level.py": True,
    "warning_while_freeing.py": True,
    "hash_seed.py": True,
    "loaded_modules.py": True,
    "frozen_objects.py": True,
    "finalizing.py": True,
    "traceback_signal.py": True,
    "destructor_in_preloaded_module.py": True,
    "atexit_fails_in_c.py": True,
    "atexit_forks.py": sys.version_info[:2] == (3, 12),
    "atexit_starts_thread.py": sys.version_info[:2] == (3, 12),
}
"""The table in supervisor/execution/ending.py, with whether this version of Python shows the difference."""


def test_every_known_difference_is_listed() -> None:
    assert {path.name for path in (SCRIPTS / "known_differences").glob("*.py")} == set(KNOWN_DIFFERENCES)


@pytest.mark.parametrize("name", KNOWN_DIFFERENCES)
def test_known_differences_are_there_and_exec_avoids_them(name: str, bare_host: WarmHost, place: Path) -> None:
    case = Case(SCRIPTS / "known_differences" / name, env={"PYTHONHASHSEED": "7"} if "hash" in name else {})
    expected = run_natural(case, place)
    exit_code, _, stdout, stderr = bare_host.run(case, clean(place), start_method="exec")
    assert result(exit_code, stdout, stderr, place) == expected
    warm = Case(case.script)
    assert (run_warm(bare_host, warm, place) != expected) == KNOWN_DIFFERENCES[name]


@pytest.mark.parametrize(
    "name", ["signal_dispositions_kernel.py", "descriptors.py", "environment.py", "command_line.py"]
)
def test_a_job_in_a_fresh_interpreter_starts_clean(name: str, bare_host: WarmHost, place: Path) -> None:
    case = Case(SCRIPTS / name)
    exit_code, _, stdout, stderr = bare_host.run(case, clean(place), start_method="exec")
    assert result(exit_code, stdout, stderr, place) == run_natural(case, place)


def test_two_jobs_never_draw_the_same(host: WarmHost, place: Path, tmp_path: Path) -> None:
    script = tmp_path / "draw.py"
    script.write_text(
        "import random, secrets, tempfile, uuid, multiprocessing, os\n"
        "print(random.random(), random.Random().random(), secrets.token_hex(8), uuid.uuid4(), uuid.uuid1())\n"
        "print(next(tempfile._get_candidate_names()), bytes(multiprocessing.current_process().authkey).hex())\n"
        "try:\n    import numpy\nexcept ImportError:\n    pass\n"
        "else:\n    print(numpy.random.random(), numpy.random.default_rng().random())\n"
    )
    outputs = [host.run(Case(script), clean(place))[2].decode().split() for _ in range(5)]
    assert all(len(set(drawn)) == len(outputs) for drawn in zip(*outputs, strict=True)), outputs


def test_a_script_that_is_kept_compiled_runs_as_it_is_on_disk(bare_host: WarmHost, place: Path, tmp_path: Path) -> None:
    script = tmp_path / "again.py"

    def write(source: str, seconds_ago: float) -> None:
        script.write_text(source)
        then = time.time() - seconds_ago
        os.utime(script, (then, then))

    def outputs(runs: int) -> set[bytes]:
        return {bare_host.run(Case(script), clean(place))[2] for _ in range(runs)}

    write("import sys\nprint('first', __file__ == sys.argv[0])\n", 60)
    assert outputs(4) == {b"first True\n"}
    write("import sys\nprint('other', __file__ == sys.argv[0])\n", 50)
    assert outputs(3) == {b"other True\n"}
    write("print('no longer'\n", 40)
    exit_code, _, stdout, stderr = bare_host.run(Case(script), clean(place))
    assert (exit_code, stdout) == (1, b"") and b"SyntaxError" in stderr


def test_a_script_in_two_releases_is_run_where_it_was_asked_for(
    bare_host: WarmHost, place: Path, tmp_path: Path
) -> None:
    """`rsync --link-dest` and `cp -al` make releases that share what has not changed."""
    for release in ("old", "new"):
        (tmp_path / release).mkdir()
        (tmp_path / release / "of_release.py").write_text(f"print({release!r})")
    (tmp_path / "old" / "job.py").write_text("import of_release")
    os.utime(tmp_path / "old" / "job.py", (0, 0))
    os.link(tmp_path / "old" / "job.py", tmp_path / "new" / "job.py")
    current = tmp_path / "current"
    outputs = []
    for release in ("old", "new"):
        current.unlink(missing_ok=True)
        current.symlink_to(release)
        outputs += [bare_host.run(Case(current / "job.py"), clean(place))[2] for _ in range(3)]
    assert outputs == [b"old\n"] * 3 + [b"new\n"] * 3


def test_variables_of_one_job_are_gone_in_the_next(place: Path, tmp_path: Path) -> None:
    """They are added to the interpreter's before the fork: the runner has those of the job before."""
    script = tmp_path / "variables.py"
    script.write_text("import os, time\nprint(list(os.environ.items()), time.tzname, flush=True)\nos.system('env')\n")
    host = WarmHost([])
    try:
        for added in (
            {"JOB_ID": "1", "SECRET": "of the first"},
            {"JOB_ID": "2", "SECRET": "of the second"},
            {"TZ": "Asia/Tokyo", "FIDELITY": "another", "JOB_ID": "3"},
            {"JOB_ID": "4", "SECRET": "of the fourth"},
            {},
            {"JOB_ID": "6", "REMOVED": ""},
        ):
            environment = {**ENVIRONMENT, **added}
            fresh = subprocess.run(
                [sys.executable, script], env=environment, cwd=clean(place), capture_output=True, check=True
            )
            assert host.run(Case(script, env=added), clean(place), adds=True)[2] == fresh.stdout
        host.run(Case(script, env={"SECRET": "of the last"}), clean(place), adds=True)
        assert b"SECRET" not in host.run(Case(script), clean(place))[2]
        assert b"SECRET" not in host.run(Case(script), clean(place), "exec", adds=True)[2]
    finally:
        host.close()


def test_a_job_ends_with_its_runner(place: Path, tmp_path: Path) -> None:
    script = tmp_path / "wait.py"
    script.write_text("import time\nprint('here', flush=True)\ntime.sleep(600)\n")
    host = WarmHost([])
    stdout, stdout_end = os.pipe()
    try:
        host.start(Case(script), clean(place), stdout_end)
        assert os.read(stdout, 100) == b"here\n"
        host.kill()
        assert select.select([stdout], [], [], DEADLINE_SECONDS)[0], "the job outlived its runner"
        assert os.read(stdout, 100) == b""
    finally:
        os.close(stdout)
        host.close()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"start_method": "exec"}, "fresh interpreter"),
        ({"python": "/usr/bin/another"}, "another interpreter"),
        ({"env": {"LANG": "C", "PYTHONPATH": "/x"}}, "PYTHONPATH"),
        ({"env": {"LANG": "de_DE.UTF-8"}}, "LANG"),
        ({"env": {"LANG": "C", "OMP_NUM_THREADS": "2"}}, "OMP_NUM_THREADS"),
        ({"env": {}}, "LANG"),
        ({"env": {"LANG": "C", "COLOR": "red", "TZ": "UTC"}}, None),
        ({"path": "{directory}"}, "not a plain file"),
        ({"path": "{directory}/missing.py"}, "cannot be read"),
        ({"path": "{directory}/link.py"}, "json beside the script shadows"),
        ({"path": "{directory}/data/script.py"}, None),
    ],
)
def test_why_a_job_cannot_be_warm(change: dict[str, object], reason: str | None, tmp_path: Path) -> None:
    shadowing = tmp_path / "shadowing"
    shadowing.mkdir()
    (shadowing / "json").mkdir()
    (shadowing / "json" / "__init__.py").touch()
    (tmp_path / "data" / "json").mkdir(parents=True)
    for name in ("script.py", "json.txt", "time.py", "os.py"):
        (tmp_path / "data" / name).touch()
    (shadowing / "real.py").touch()
    (tmp_path / "script.py").touch()
    (tmp_path / "link.py").symlink_to(shadowing / "real.py")
    values = {"path": "{directory}/script.py", "args": [], "env": {"LANG": "C"}, "cwd": None, "start_method": "warm"}
    values |= {"python": sys.executable, **change}
    launch = Launch(**{**values, "path": str(values["path"]).format(directory=tmp_path)})  # type: ignore[arg-type]
    found = why_not_warm(launch, base_env={"LANG": "C"}, top_level_names={"json", "os", "time"}, python=sys.executable)
    assert found is None if reason is None else found is not None and reason in found


def test_a_module_that_appears_beside_the_script_is_noticed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.touch()
    launch = Launch(str(script), [], {}, None, "warm", sys.executable)
    old = time.time() - 3600
    os.utime(tmp_path, (old, old))
    for expected in (None, None, "json beside the script shadows a module that is already loaded"):
        assert why_not_warm(launch, base_env={}, top_level_names={"json"}, python=sys.executable) == expected
        if (tmp_path / "other.py").exists():
            (tmp_path / "json.py").touch()
        else:
            (tmp_path / "other.py").touch()


TITLE_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from supervisor.execution.title import ProcessTitle
title = ProcessTitle.of_this_process({})
if sys.argv[2] == "refused":
    title._prctl = lambda *_: -1
for words in (["first", "title"], ["python", "a b", ""]):
    title.set(words, {"JOB_ID": "7"}, adds=False)
sys.stdout.write(open("/proc/self/cmdline").read() + "|" + open("/proc/self/environ").read())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can do it")
def test_a_process_shows_its_job_even_where_the_areas_cannot_be_moved() -> None:
    def shown(kernel: str) -> list[str]:
        command = [sys.executable, "-c", TITLE_SCRIPT, str(HERE.parent.parent), kernel, "padding" * 100]
        environment = {"FIDELITY": "of the warm interpreter"}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.split("|")

    assert shown("willing") == ["python\0a b\0\0", "JOB_ID=7\0"]
    command_line, environment = shown("refused")
    assert command_line.rstrip("\0") == "python\0a b"
    assert environment == "FIDELITY=of the warm interpreter\0"
