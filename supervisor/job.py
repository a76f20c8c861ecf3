"""What a job is, and what becomes of it.

`JobSpec` is the door: everything that a producer wrote is validated here once, whoever wrote it, and a document that
cannot be run is refused with the name of its field. `decide` is the whole policy of retries, losses and hand-backs as
a pure function; `supervisor.store.transitions` turns its verdict into one conditional write.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from supervisor.errors import InvalidJob
from supervisor.states import Ending, Reason, Status

DEFAULT_MEMORY_MB = 128
MAX_LOSSES = 3
"""A job whose attempts were lost this often to crashes is `failed`, `lost`: it may be what kills its hosts."""
MAX_RETRY_DELAY_SECONDS = 3600.0
MAX_ARGUMENT_BYTES = 131_071
"""The kernel's limit for one argument or variable (MAX_ARG_STRLEN, execve(2)), less its terminating NUL."""
MAX_ARGUMENTS_BYTES = 2_000_000 - 128_000
"""The kernel's limit for all of them together (a quarter of the default stack), less room for the environment."""
MAX_INT = 2**63 - 1
MAX_COUNT = MAX_INT - 1
"""What another program wrote beyond it could not be counted up and written back."""


def _whole(value: Any) -> Any:
    """JavaScript clients and the shell store every number as a double: 128.0 is a whole number."""
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return int(value)
    return value


def _text(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not contain NUL bytes")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode (it has a lone surrogate)") from None
    if size > MAX_ARGUMENT_BYTES:
        raise ValueError(f"is {size} bytes long, the limit is {MAX_ARGUMENT_BYTES}")
    return value


def _size(strings: Iterable[str]) -> int:
    """What they need when a process is started."""
    return sum(len(string.encode()) + 9 for string in strings)  # 9: the terminating NUL and a pointer


def _arguments(value: list[str]) -> list[str]:
    size = _size(value)
    if size > MAX_ARGUMENTS_BYTES:
        raise ValueError(f"needs {size} bytes in all, the limit is {MAX_ARGUMENTS_BYTES}")
    return value


def _environment(value: dict[str, str]) -> dict[str, str]:
    for name, text in value.items():
        if not name or "=" in name:
            raise ValueError(f"{name!r} is not the name of a variable")
        _text(f"{name}={text}")  # the kernel's limit is on both together
    return value


def _utc(value: datetime) -> datetime:
    try:
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    except OverflowError:
        raise ValueError("is outside the years 1 to 9999 in UTC") from None


Text = Annotated[str, AfterValidator(_text)]
Name = Annotated[Text, Field(min_length=1)]
Whole = Annotated[int, BeforeValidator(_whole), Field(le=MAX_INT)]
Positive = Annotated[Whole, Field(ge=1)]
Seconds = Annotated[float, Field(allow_inf_nan=False)]
Date = Annotated[datetime, AfterValidator(_utc)]


class JobSpec(BaseModel):
    """What a producer asks for. Unknown fields are ignored, absent and null ones take their default."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    request_name: Text
    python_path: Name
    python_args: Annotated[list[Text], AfterValidator(_arguments)] = []
    required_memory: Positive = DEFAULT_MEMORY_MB
    scheduled_date: Date | None = None
    queue: Name = "default"
    priority: Annotated[Whole, Field(ge=-MAX_INT - 1)] = 0
    timeout: Annotated[Seconds, Field(gt=0)] | None = None
    max_attempts: Positive = 1
    retry_delay: Annotated[Seconds, Field(ge=0)] = 5.0
    unique_key: Annotated[Name, Field(max_length=500)] | None = None
    env: Annotated[dict[Text, Text], AfterValidator(_environment)] = {}
    cwd: Name | None = None
    start_method: Literal["warm", "exec"] | None = None
    tags: list[Text] = []
    memory_warning: bool = False
    memory_growth: Annotated[Seconds, Field(gt=1, le=100)] | None = None
    max_memory: Positive | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            return {name: data[name] for name in cls.model_fields if data.get(name) is not None}
        return data

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """The job that a document describes; raises `InvalidJob` with the first field that is wrong."""
        try:
            spec = cls.model_validate(document)
        except ValidationError as error:
            raise _invalid(error) from None
        size = _size(spec.python_args) + _size(f"{name}={value}" for name, value in spec.env.items())
        if size > MAX_ARGUMENTS_BYTES:
            raise InvalidJob("env", f"needs {size} bytes together with python_args, the limit is {MAX_ARGUMENTS_BYTES}")
        if spec.memory_growth is not None and spec.max_memory is None:
            raise InvalidJob("max_memory", "is missing: memory_growth goes on up to it")
        if spec.max_memory is not None and spec.max_memory < spec.required_memory:
            raise InvalidJob(
                "max_memory", f"is {spec.max_memory} MB, less than the {spec.required_memory} MB in required_memory"
            )
        return spec


def _invalid(error: ValidationError) -> InvalidJob:
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"] if part != "[key]") or "document"
    if first["type"] == "missing":
        return InvalidJob(field, "is missing")
    message = first["msg"].removeprefix("Value error, ")
    shown = repr(first["input"])
    if first["type"] != "value_error":
        message = f"{message[0].lower()}{message[1:]}, not {shown if len(shown) <= 60 else shown[:60] + '…'}"
    return InvalidJob(field, message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What earlier attempts of the job came to."""

    attempts: int = 0
    failures: int = 0
    interruptions: int = 0
    losses: int = 0

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        def count(name: str) -> int:
            value = document.get(name)
            return min(int(value), MAX_COUNT) if isinstance(value, int | float) and math.isfinite(value) else 0

        return cls(
            attempts=count("attempts"),
            failures=count("failures"),
            interruptions=count("interruptions"),
            losses=count("losses"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one attempt ended."""

    reason: Reason | None = None
    """None: it succeeded, or it was handed back."""
    error: str | None = None
    exit_code: int | None = None
    peak_memory_mb: int | None = None
    handed_back: str | None = None
    """Why it was stopped before it could end by itself, where that says nothing about the job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What becomes of the job: its next status, the counter that goes up, and when it may run again."""

    status: Status
    counter: Literal["failures", "interruptions", "losses"] | None = None
    retry_after_seconds: float | None = None
    required_memory: int | None = None
    """The new limit in MB, when the job is tried again with more memory."""
    note: str = ""
    """The sentence for the job's log."""


def decide(
    spec: JobSpec | None, counts: Counts, outcome: Outcome, *, jitter: Callable[[], float] = random.random
) -> Verdict:
    """What becomes of a job whose attempt ended so. `spec` is None where the document could not be read."""
    if outcome.handed_back is not None:
        note = f"interrupted: {outcome.handed_back}; back to pending"
        return Verdict(status=Status.PENDING, counter="interruptions", note=note)
    if outcome.reason is None:
        return Verdict(status=Status.COMPLETED, note="completed")
    if outcome.reason is Reason.CANCELLED:
        return Verdict(status=Status.CANCELLED, note="cancelled")
    if outcome.reason is Reason.LOST:
        return _after_loss(counts)
    if spec is None or outcome.reason is Reason.INVALID_JOB:
        return Verdict(status=Status.FAILED, counter="failures", note=f"failed: {outcome.error}")
    if outcome.reason is Reason.MEMORY_EXCEEDED and (grown := grown_memory(spec)):
        note = f"{outcome.error}; tried again with {grown} MB instead of {spec.required_memory} MB"
        return Verdict(status=Status.PENDING, retry_after_seconds=0.0, required_memory=grown, note=note)
    failures = counts.failures + 1
    if failures >= spec.max_attempts:
        return Verdict(status=Status.FAILED, counter="failures", note=f"failed: {outcome.error}")
    delay = retry_delay(spec.retry_delay, failures, jitter())
    note = f"attempt failed ({failures} of {spec.max_attempts}): {outcome.error}; tried again in {delay:.1f} s"
    return Verdict(status=Status.PENDING, counter="failures", retry_after_seconds=delay, note=note)


def _after_loss(counts: Counts) -> Verdict:
    losses = counts.losses + 1
    if losses >= MAX_LOSSES:
        return Verdict(status=Status.FAILED, counter="losses", note=f"failed: lost {losses} times")
    return Verdict(status=Status.PENDING, counter="losses", note=f"lost ({losses} of {MAX_LOSSES}), back to pending")


def lease_margin(lease_seconds: float) -> float:
    """How long before its end a lease stops being relied on: time enough to kill everything."""
    return min(2.0, lease_seconds * 0.2)


def retry_delay(first_seconds: float, failures: int, jitter: float) -> float:
    """Seconds until the next attempt: doubles with each failure, up to 20 % more by `jitter` (0 to 1), at most 1 h."""
    doubled = first_seconds * 2.0 ** min(failures - 1, 60)
    return min(MAX_RETRY_DELAY_SECONDS, doubled * (1 + 0.2 * jitter))


def grown_memory(spec: JobSpec) -> int | None:
    """The next limit in MB of a job that wants to be tried again with more memory, or None."""
    if spec.memory_growth is None or spec.max_memory is None:
        return None
    grown = min(math.ceil(spec.required_memory * spec.memory_growth), spec.max_memory)
    return grown if grown > spec.required_memory else None


def outcome_of(
    ending: Ending, exit_code: int | None, *, error: str | None, peak_memory_mb: int | None, last_words: str
) -> Outcome:
    """The outcome of an attempt from its runner's report. `last_words` is the last line on standard error."""

    def outcome(reason: Reason | None, sentence: str | None) -> Outcome:
        return Outcome(reason=reason, error=sentence, exit_code=exit_code, peak_memory_mb=peak_memory_mb)

    if ending is Ending.MEMORY_EXCEEDED:
        return outcome(Reason.MEMORY_EXCEEDED, error)
    if ending is Ending.TIMEOUT:
        return outcome(Reason.TIMEOUT, error)
    if ending is Ending.CANCELLED:
        return outcome(Reason.CANCELLED, error or "cancelled on request")
    if ending is Ending.START_FAILED:
        return outcome(Reason.START_FAILED, error)
    if ending is Ending.LEASE_ENDED:
        why = error or "its lease was lost"
        return Outcome(exit_code=exit_code, peak_memory_mb=peak_memory_mb, handed_back=why)
    if exit_code == 0:
        return outcome(None, None)
    if ending is Ending.INTERRUPTED:
        return Outcome(exit_code=exit_code, peak_memory_mb=peak_memory_mb, handed_back="the supervisor shuts down")
    if exit_code is None:
        return outcome(Reason.LOST, "the end of its process was not seen")
    if exit_code < 0:
        from signal import Signals  # only here: it is an import for the end of every job

        try:
            name = Signals(-exit_code).name
        except ValueError:
            name = "an unnamed signal"
        hint = ", sent by neither this supervisor nor the job's limit" if exit_code == -9 else ""
        return outcome(Reason.SIGNAL, f"killed by signal {-exit_code} ({name}){hint}")
    return outcome(Reason.EXIT_CODE, f"exited with code {exit_code}" + (f": {last_words}" if last_words else ""))
