"""Every error that is raised on purpose: it knows its sentence, and the exit code of a command that ends by it."""

from __future__ import annotations


class SupervisorError(Exception):
    """The request did not succeed."""

    exit_code = 1

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (self.__doc__ or "").splitlines()[0])


class UsageError(SupervisorError):
    """The command was used in a wrong way."""

    exit_code = 2


class ConfigurationError(SupervisorError):
    """A setting has a wrong value; `setting` is its name without the prefix `SUPERVISOR_`."""

    exit_code = 2

    def __init__(self, message: str, *, setting: str) -> None:
        super().__init__(f"SUPERVISOR_{setting}: {message}")
        self.setting = setting


class InvalidJob(SupervisorError):
    """A job cannot be run as it is described; `field` is the field of the document that is wrong."""

    exit_code = 2

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class JobNotFound(SupervisorError):
    """There is no such job."""


class DuplicateJob(SupervisorError):
    """A pending or running job has the same unique key; `job_id` is its id, where it is known."""

    def __init__(self, unique_key: str, job_id: str | None = None) -> None:
        owner = f" (job {job_id})" if job_id else ""
        super().__init__(f"unique_key: {unique_key!r} is taken by a pending or running job{owner}")
        self.unique_key = unique_key
        self.job_id = job_id


class LeaseLost(SupervisorError):
    """The job is no longer held by this owner: another one may have it, and nothing was written."""


class StoreUnavailable(SupervisorError):
    """MongoDB cannot be reached."""

    exit_code = 3
