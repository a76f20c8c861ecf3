"""The lookout: one process that watches the jobs at rest of all runners, and wakes a runner whose job moves.

    runner ──Rest, open files, a pipe──► lookout        the pipe: a byte when it is watched, its end when it moves

A runner goes on looking by itself until that byte has come, and looks again when the pipe ends: because the job has
moved, or because the lookout is gone. So nothing is lost with it, and no job is ever watched by nobody.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
from dataclasses import dataclass, field
from os import pread

from supervisor.memory.rest import SCHEDSTAT_BYTES, WatchedRest
from supervisor.messages import AtRest, Channel, ChannelClosed, Ping, Pong
from supervisor.processes import clock, run_before_others


@dataclass(slots=True)
class Group:
    """Jobs that are looked at together, every `step` seconds; by the pipe to the runner."""

    step: float
    next_look: float
    rests: dict[int, WatchedRest] = field(default_factory=dict)
    threads: dict[int, bytes] = field(default_factory=dict)
    """What is read again and again, and what it said."""
    pipes: dict[int, int] = field(default_factory=dict)
    """Whose thread that is."""

    def add(self, pipe: int, rest: WatchedRest) -> None:
        self.rests[pipe] = rest
        self.threads |= rest.ran
        self.pipes |= dict.fromkeys(rest.ran, pipe)

    def remove(self, pipe: int) -> WatchedRest:
        rest = self.rests.pop(pipe)
        for thread in rest.ran:
            del self.threads[thread], self.pipes[thread]
        return rest

    def that_ran(self) -> set[int]:
        """The jobs of which a thread has run since, or has ended."""
        ran = set()
        for thread, before in self.threads.items():
            try:
                if pread(thread, SCHEDSTAT_BYTES, 0) == before:
                    continue
            except OSError:
                pass
            ran.add(self.pipes[thread])
        return ran


class Lookout:
    """The main loop. `requests` is where all runners send what they hand over."""

    def __init__(self, supervisor: Channel, requests: Channel) -> None:
        self._supervisor = supervisor
        self._requests = requests
        self._groups: dict[float, Group] = {}
        """By the seconds between looks: a wake-up costs more than some looks, so many jobs share it."""
        self._poll = select.poll()
        for descriptor in (supervisor.fileno(), requests.fileno()):
            self._poll.register(descriptor, select.POLLIN)

    def run(self) -> int:
        """Watches until the supervisor is gone; returns the exit code."""
        run_before_others()
        _allow_many_descriptors()
        try:
            while True:
                self._turn()
        except ChannelClosed:
            return 0

    def _turn(self) -> None:
        for descriptor, _ in self._poll.poll(self._timeout_ms()):
            if descriptor == self._requests.fileno():
                self._take_over()
            elif isinstance(self._supervisor.receive()[0], Ping):
                self._supervisor.send(Pong())
        now = clock()
        for group in list(self._groups.values()):
            if group.next_look <= now:
                self._look_at(group, now)

    def _timeout_ms(self) -> float | None:
        if not self._groups:
            return None
        return max(0.0, (min(group.next_look for group in self._groups.values()) - clock()) * 1000)

    def _look_at(self, group: Group, now: float) -> None:
        group.next_look = now + group.step
        for pipe in group.that_ran():
            rest = group.remove(pipe)
            if rest.has_moved():
                _let_go(pipe, rest)
            else:
                self._watch(pipe, rest, now)
        if not group.rests:
            del self._groups[group.step]

    def _watch(self, pipe: int, rest: WatchedRest, now: float) -> None:
        self._groups.setdefault(rest.step, Group(rest.step, now + rest.step)).add(pipe, rest)

    def _take_over(self) -> None:
        message, descriptors = self._requests.receive()
        assert isinstance(message, AtRest)
        if len(descriptors) < 1 + message.count_files():  # none is left here: who sent it sees the end of the pipe
            for descriptor in descriptors:
                os.close(descriptor)
            return
        pipe, *files = descriptors
        rest = WatchedRest(message, files)
        try:
            if not rest.has_moved():
                os.write(pipe, b"\0")
                self._watch(pipe, rest, clock())
                return
        except OSError:  # the job has ended, and nobody listens any more
            pass
        _let_go(pipe, rest)


def _let_go(pipe: int, rest: WatchedRest) -> None:
    rest.close()
    os.close(pipe)


def _allow_many_descriptors() -> None:
    """Some for each job, and there is no limit to the workers."""
    with contextlib.suppress(OSError, ValueError):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
