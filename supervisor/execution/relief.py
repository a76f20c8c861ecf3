"""The runner's side of the lookout: a job at rest is handed over, and comes back when it moves."""

from __future__ import annotations

import os

from supervisor.memory.rest import Rest
from supervisor.messages import Channel, ChannelClosed, ChannelFull

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.25, 4.0
"""A job that came back at once is kept for a while, twice as long each time."""
BRIEF_SECONDS = 1.0


class Relief:
    """At most one job at a time is handed over."""

    def __init__(self, lookout: int) -> None:
        """`lookout` is the descriptor of the socket on which it hears all runners."""
        self.watches = False
        """Whether the lookout watches the job now."""
        self._lookout = Channel.from_descriptor(lookout)
        self._pipe = -1
        self._began = 0.0
        self._pause = FIRST_PAUSE_SECONDS
        self._not_before = 0.0

    def fileno(self) -> int:
        """Where the lookout is heard; -1 while nothing is handed over."""
        return self._pipe

    def may_take(self, now: float) -> bool:
        """Whether a job could be handed over."""
        return self._pipe < 0 and now >= self._not_before

    def hand_over(self, rest: Rest, now: float) -> bool:
        """Whether it was sent. It is not watched before `watches` says so. Closes what was opened for it."""
        try:
            ours, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:  # no descriptor is left
            rest.close()
            self._not_before = now + self._pause
            return False
        try:
            self._lookout.send(rest.message(), [theirs, *rest.descriptors], wait=False)
        except (ChannelClosed, ChannelFull, OSError):  # it takes nothing more
            os.close(ours)
            self._not_before = now + self._pause
            return False
        finally:
            os.close(theirs)
            rest.close()
        self._pipe, self._began = ours, now
        return True

    def hear(self, now: float) -> None:
        """The lookout watches from now on, or the job is the runner's again."""
        if os.read(self._pipe, 1):
            self.watches = True
            return
        self._close()
        brief = now - self._began < BRIEF_SECONDS
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS) if brief else FIRST_PAUSE_SECONDS
        self._not_before = now + self._pause

    def end(self) -> None:
        """The job has ended: the next one is another."""
        self._close()
        self._pause, self._not_before = FIRST_PAUSE_SECONDS, 0.0

    def _close(self) -> None:
        os.close(self._pipe)
        self._pipe, self.watches = -1, False
