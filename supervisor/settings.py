"""Every setting, declared once with its sentence; nothing else in this package reads the environment.

Values come from variables with the prefix `SUPERVISOR_`, then from `settings.env` in the working directory
(`SUPERVISOR_ENV_FILE` names another), then from the defaults here.
"""

from __future__ import annotations

import os
import pwd
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from dotenv.parser import parse_stream
from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from supervisor.errors import ConfigurationError

PREFIX = "SUPERVISOR_"
ENV_FILE_VARIABLE = "SUPERVISOR_ENV_FILE"
DEFAULT_ENV_FILE = "settings.env"

OWN_COLLECTIONS = ("job_logs", "supervisors")
"""What stands beside the jobs in their database."""
MAX_DATABASE_BYTES = 63
MAX_NAMESPACE_BYTES = 255
MAX_MEMORY_MB = 2**30
"""1 PB: beyond it is a typing error, not a host."""
INTERPRETER_SECONDS = 5.0

Names = Annotated[tuple[str, ...], NoDecode]


class Settings(BaseSettings):
    """The configuration of one supervisor, and of the commands that talk to its database."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_file_encoding="utf-8", extra="ignore", frozen=True, env_ignore_empty=True
    )

    mongo_uri: str = Field("", description="MongoDB connection string; empty = the embedded MongoDB in DATA_DIR.")
    mongo_db: str = Field("job_db", min_length=1, description="Database that holds the jobs.")
    mongo_collection: str = Field("jobs", min_length=1, description="Collection that holds the jobs.")
    data_dir: Path = Field(Path(".supervisor"), description="Embedded database, sockets, spooled results.")
    workers: int = Field(os.cpu_count() or 1, ge=1, le=1024, description="Size of the pool. Default: CPUs.")
    queues: Names = Field((), description="Comma-separated queues that this supervisor serves; empty = all.")
    task_roots: Names = Field(
        (), description="Comma-separated directories that scripts must be in; empty = the working directory."
    )
    start_method: Literal["warm", "exec"] = Field(
        "warm", description="warm = forked from a preloaded interpreter, exec = a fresh interpreter for each job."
    )
    preload: Names = Field((), description="Comma-separated modules imported once into the warm interpreter.")
    python: str = Field(sys.executable, min_length=1, description="Interpreter for exec. Default: this one.")
    run_as: str | None = Field(
        None, min_length=1, description="User that jobs run as, if the supervisor runs as root. Default: its own user."
    )
    isolation: Literal["none", "pidns"] = Field(
        "none", description="pidns = each job in a PID namespace of its own that nothing escapes; needs root."
    )
    memory_budget: int | None = Field(
        None,
        ge=1,
        le=MAX_MEMORY_MB,
        description="MB that running jobs may reserve in all. Default: 90 % of what is available.",
    )
    memory_enforcement: Literal["auto", "sampling", "cgroup"] = Field(
        "auto",
        description="sampling = jobs are watched, cgroup = the kernel limits them, too (cgroup v2), auto = if it can.",
    )
    memory_check_interval: float = Field(
        0.1, gt=0, le=60, description="Seconds, at most, between two looks at a job's memory; fewer near its limit."
    )
    oom_score_adj: int = Field(
        500, ge=0, le=1000, description="How much the kernel's out-of-memory killer prefers jobs to the supervisor."
    )
    memory_pressure: float = Field(
        5.0, ge=0, lt=100, description="Claiming pauses while less than this share (%) of the host's memory is free."
    )
    lease_seconds: float = Field(
        30.0, ge=1, le=86400, description="A lease that was not renewed for this long is taken back by anyone."
    )
    poll_interval: float = Field(
        5.0, gt=0, le=3600, description="Seconds between fallback looks at the queue; new jobs wake the pool at once."
    )
    default_timeout: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Wall-clock limit in seconds of jobs that name none. Default: none.",
    )
    kill_grace: float = Field(
        5.0, ge=0, le=3600, description="Seconds from SIGTERM to SIGKILL on timeout, cancel and shutdown."
    )
    shutdown_timeout: float = Field(
        30.0, ge=0, le=86400, description="Seconds that running jobs may go on after SIGTERM."
    )
    log_limit: float = Field(
        16.0, gt=0, le=4096, description="MB of output kept for each attempt: the first and the last half."
    )
    log_format: Literal["text", "json"] = Field("text", description="Form of the supervisor's own log.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    retention_days: float = Field(
        0.0, ge=0, le=36500, description="Age at which finished jobs and their output are removed; 0 = never."
    )
    metrics_host: str = Field("127.0.0.1", min_length=1, description="Address of the HTTP server.")
    metrics_port: int = Field(9108, ge=0, le=65535, description="Port of the HTTP server; 0 = no HTTP server.")

    @field_validator("queues", "task_roots", "preload", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("start_method", "isolation", "memory_enforcement", "log_format", "log_level", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.strip().lower() if isinstance(value, str) else value

    @field_validator("mongo_uri")
    @classmethod
    def _is_mongodb_uri(cls, value: str) -> str:
        if value and not value.startswith(("mongodb://", "mongodb+srv://")):
            raise ValueError("must begin with mongodb:// or mongodb+srv://")
        return value

    @field_validator("mongo_db")
    @classmethod
    def _is_name_of_database(cls, value: str) -> str:
        wrong = sorted(set(value) & set('/\\. "$\0'))
        if wrong:
            raise ValueError(f"must be a name without {wrong[0]!r}")
        if len(value.encode()) > MAX_DATABASE_BYTES:
            raise ValueError(f"must be at most {MAX_DATABASE_BYTES} bytes long")
        return value

    @field_validator("mongo_collection")
    @classmethod
    def _is_name_of_collection(cls, value: str, others: ValidationInfo) -> str:
        if value in OWN_COLLECTIONS:
            raise ValueError("must be a name that this program does not use itself")
        if value.startswith("system."):
            raise ValueError("must be a name that does not begin with 'system.'")
        if value.startswith(".") or value.endswith(".") or ".." in value:
            raise ValueError("must be a name without a dot at an end, or two in a row")
        wrong = sorted(set(value) & {"$", "\0"})
        if wrong:
            raise ValueError(f"must be a name without {wrong[0]!r}")
        if len(f"{others.data.get('mongo_db', '')}.{value}".encode()) > MAX_NAMESPACE_BYTES:
            raise ValueError(f"must be at most {MAX_NAMESPACE_BYTES} bytes long, together with MONGO_DB and a dot")
        return value

    @property
    def roots(self) -> tuple[Path, ...]:
        """The directories that scripts must be in, resolved; raises `ConfigurationError` where that cannot be."""
        return tuple(_resolved(root) for root in self.task_roots or (os.getcwd(),))

    @property
    def host(self) -> str:
        return socket.gethostname()


def load_settings(**overrides: Any) -> Settings:
    """The settings of this process; raises `ConfigurationError` with the first setting that is wrong."""
    file = _env_file()
    try:
        if file is not None:
            _check_env_file(file)
        settings = Settings(_env_file=file, **overrides)  # type: ignore[call-arg]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]).upper() if first["loc"] else "?"
        message = first["msg"].removeprefix("Value error, ")
        value = repr(first["input"])
        shown = f", not {value if len(value) <= 80 else value[:80] + '…'}"
        shown = "" if name == "MONGO_URI" else shown  # it may hold a password
        raise ConfigurationError(_lower_first(message) + shown, setting=name) from None
    except OSError as error:
        raise ConfigurationError(f"{file}: {error.strerror}", setting="ENV_FILE") from None
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"the file is not UTF-8 text ({error.reason})", setting="ENV_FILE") from None
    return settings


def check_for_supervising(settings: Settings) -> None:
    """What only the supervisor needs to be right; raises `ConfigurationError`."""
    for root in settings.roots:
        if not os.path.isdir(root):
            raise ConfigurationError(f"{str(root)!r} is not a directory", setting="TASK_ROOTS")
    check_interpreter(settings.python)
    account_of(settings)


def check_interpreter(python: str) -> None:
    """Raises `ConfigurationError` when the interpreter for `exec` is none; it is asked, unless it is this one."""
    if not os.path.isfile(python) or not os.access(python, os.X_OK):
        raise ConfigurationError(f"{python!r} is not an executable file", setting="PYTHON")
    if python == sys.executable:
        return
    question = "import sys; print('Python', sys.version_info[0])"
    try:
        answer = subprocess.run(
            [python, "-c", question],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if not is_ours(name)},
            timeout=INTERPRETER_SECONDS,
        )
    except OSError as error:
        raise ConfigurationError(f"{python!r} cannot be started: {error.strerror}", setting="PYTHON") from None
    except subprocess.TimeoutExpired:
        message = f"{python!r} did not answer within {INTERPRETER_SECONDS:g} s"
        raise ConfigurationError(message, setting="PYTHON") from None
    if answer.stdout.split() != [b"Python", b"3"]:
        raise ConfigurationError(f"{python!r} is no interpreter of Python 3", setting="PYTHON")


@dataclass(frozen=True, slots=True)
class Account:
    """A user as a job's process becomes it: the user id, then the group ids, the primary group first."""

    ids: list[int]
    environment: dict[str, str]


def account_of(settings: Settings) -> Account | None:
    """The user that jobs run as, None: the supervisor's own. Raises `ConfigurationError`.

    Asked before jobs run, never in their processes: a directory of users may be a network away.
    """
    if settings.run_as is None:
        return None
    try:
        user = pwd.getpwuid(int(settings.run_as)) if settings.run_as.isdigit() else pwd.getpwnam(settings.run_as)
    except (KeyError, OverflowError):
        raise ConfigurationError(f"there is no user {settings.run_as!r}", setting="RUN_AS") from None
    if user.pw_uid == os.geteuid():
        return None
    if os.geteuid() != 0:
        raise ConfigurationError("only root may run jobs as another user", setting="RUN_AS")
    others = [group for group in os.getgrouplist(user.pw_name, user.pw_gid) if group != user.pw_gid]
    environment = {"HOME": user.pw_dir, "USER": user.pw_name, "LOGNAME": user.pw_name}
    return Account([user.pw_uid, user.pw_gid, *others], environment)


def unknown_settings() -> list[str]:
    """Names with our prefix that mean nothing: most likely typing errors."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    names = {name for name in os.environ if is_ours(name)}
    file = _env_file()
    if file is not None:
        names |= set(re.findall(rf"^\s*(?:export\s+)?({PREFIX}\w+)\s*=", file.read_text("utf-8"), re.M | re.I))
    return sorted(name for name in names - {ENV_FILE_VARIABLE} if name.upper() not in known)


def is_ours(variable: str) -> bool:
    """Whether an environment variable is a setting, in whatever case: its value may be a secret."""
    return variable.upper().startswith(PREFIX)


def _resolved(root: str) -> Path:
    try:
        return Path(root).expanduser().resolve()
    except (RuntimeError, OSError, ValueError) as error:  # no such user, a loop of links, a NUL byte
        raise ConfigurationError(f"{root!r}: {_lower_first(str(error))}", setting="TASK_ROOTS") from None


def _env_file() -> Path | None:
    named = os.environ.get(ENV_FILE_VARIABLE)
    if named:
        if not Path(named).is_file():
            raise ConfigurationError(f"there is no file {named!r}", setting="ENV_FILE")
        return Path(named)
    default = Path(DEFAULT_ENV_FILE)
    return default if default.is_file() else None


def _check_env_file(file: Path) -> None:
    """Raises `ConfigurationError` at the first line that is no setting: it would be passed over."""
    with open(file, encoding="utf-8") as lines:
        for each in parse_stream(lines):
            if each.error or (each.key is not None and each.value is None):
                blank = len(each.original.string) - len(each.original.string.lstrip("\r\n"))
                number = each.original.line + each.original.string[:blank].count("\n")
                raise ConfigurationError(f"{file}:{number}: is not of the form NAME=VALUE", setting="ENV_FILE")


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


_CREDENTIALS = re.compile(r"(mongodb(?:\+srv)?://)\S[^\n]*@(?=[^@\s]*)")
_SECRET_OPTIONS = re.compile(
    r"([?&;]\w*(?:password|passphrase|secret|token|credential|mechanismproperties)\w*=)[^&\s]*", re.IGNORECASE
)
"""Options such as tlsCertificateKeyFilePassword, and authMechanismProperties, which may hold the token of a session."""


def masked(text: str) -> str:
    """The text with the user and password of every MongoDB URI in it replaced, and its secret options.

    Errs on the side of hiding: a password that was not percent-encoded may hold any character, spaces too.
    """
    return _SECRET_OPTIONS.sub(r"\1***", _CREDENTIALS.sub(r"\1***@", text))
