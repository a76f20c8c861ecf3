"""Which worker may claim how large a job, so that what all running jobs reserved stays within the budget.

Pure bookkeeping in MB, kept by the supervisor process: no I/O, no clock. If a worker dies, release its key.

A job's way: the supervisor makes an idle worker an *offer*; the worker claims a job of up to `limit_mb`. One
of up to `sure_mb` starts at once, since the offer holds that much for it (`settle`). For a larger one the worker asks
(`ask`), because others claim at the same time; the answer may have to wait until it is known what they found
(`answers`). Either ends the offer.

A job too large for what is free could wait for ever behind a stream of small ones. So the keeper reports the
first due job, the *head*. Once that has been passed over for `patience` seconds, room is kept for it: jobs
that start from then on get together only what the head leaves over. So it starts at the latest when all that
ran at that moment have ended: after patience and the longest of their remaining runs.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

USUAL_MB = 128
"""What most jobs need: an offer that is sure of less would only make workers ask."""
_REPORT_HOLDS_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Offer:
    """Claim one job of up to `limit_mb`; start it at once if it needs at most `sure_mb`, else ask first."""

    limit_mb: int
    sure_mb: int


@dataclass(frozen=True, slots=True)
class _Head:
    mb: int
    since: float
    reported: float


class Budget:
    """Reservations and offers by key. A key is one slot: at most one job and one offer at a time."""

    def __init__(self, total_mb: int, patience: float = 10.0) -> None:
        self._total = total_mb
        self._patience = patience
        self._reserved: dict[Hashable, int] = {}
        self._offers: dict[Hashable, Offer] = {}
        self._head: _Head | None = None
        self._older: set[Hashable] | None = None
        """While room is kept for the head: who held memory or an offer when that began, and still does."""
        self._server: Hashable | None = None
        """Whose offer is large enough for the head."""
        self._asked: dict[Hashable, int] = {}
        """The sizes of jobs that were claimed, and wait for an answer."""
        self._paused: str | None = None

    @property
    def total(self) -> int:
        return self._total

    @property
    def reserved(self) -> int:
        return sum(self._reserved.values())

    @property
    def free(self) -> int:
        """What no job has reserved; 0 when the budget was made smaller than what runs."""
        return max(0, self._total - self.reserved)

    @property
    def kept(self) -> int:
        """The size of the job that room is kept for; 0 when there is none."""
        return self._head.mb if self._head is not None and self._older is not None else 0

    @property
    def paused(self) -> str | None:
        """Why no offers are made; None while they are."""
        return self._paused

    def pause(self, reason: str) -> None:
        """Make no offers until `resume`; those made already hold."""
        self._paused = reason

    def resume(self) -> None:
        self._paused = None

    def resize(self, total_mb: int) -> None:
        """Running jobs keep what they have, even if that is more than the new total."""
        self._total = total_mb

    # -- what runs

    def reserve(self, key: Hashable, mb: int) -> None:
        """Note a job that runs in any case; it ends the slot's offer."""
        self._end_offer(key)
        self._reserved[key] = mb

    def release(self, key: Hashable) -> None:
        """The slot's job has ended, or its worker has: nothing is held for it any more."""
        self._reserved.pop(key, None)
        self._end_offer(key)
        self._forget_age(key)

    # -- what may be claimed

    def offer(self, now: float, key: Hashable, idle: int) -> Offer | None:
        """An offer to this idle worker, one of `idle` that have none yet; None while nothing can be given.

        Takes the place of an earlier offer to the same key.
        """
        self._end_offer(key)
        self._forget_age(key)
        room = self.room(now)
        if room < 1:
            return None
        if self._could_serve(self._promises()):
            self._server = key
        sure = min(room, max(room // max(1, idle), USUAL_MB))
        if self._server == key:
            sure = max(sure, self.kept)
        self._offers[key] = Offer(room, sure)
        return self._offers[key]

    def room(self, now: float) -> int:
        """The limit that a new offer would have now, in MB; below 1 there would be none."""
        self._consider_head(now)
        if self._paused is not None:
            return 0
        promises = self._promises()
        return self._room(promises, serves=self._could_serve(promises))

    def ask(self, key: Hashable, mb: int) -> None:
        """The offer's claim came to a job of more than the sure part: may it start?"""
        self._asked[key] = mb
        self._offers.setdefault(key, Offer(mb, 0))

    def answers(self) -> list[tuple[Hashable, bool]]:
        """Answers what can be answered now, the oldest offer first.

        True: the job is reserved. False: it does not fit, and must be given back. A job that would fit if the claims
        that are under way came to nothing gets no answer yet: given back, it would lose its turn.
        """
        answers = []
        promises = {key: offer.sure_mb for key, offer in self._offers.items() if key not in self._asked}
        for key in [key for key in self._offers if key in self._asked]:
            mb, serves = self._asked[key], key == self._server
            if mb > self._room({}, serves=serves):
                self._end_offer(key)
                answers.append((key, False))
            elif mb <= self._room(promises, serves=serves):
                self._start(key, mb)
                answers.append((key, True))
            else:
                promises[key] = mb
        return answers

    def settle(self, key: Hashable, mb: int | None) -> None:
        """The offer's end: a job of `mb` has started, or none.

        Raises ValueError for a job that the offer did not allow to start without asking.
        """
        if mb is None:
            self._end_offer(key)
            return
        offer = self._offers.get(key)
        if offer is None or mb > offer.sure_mb:
            raise ValueError(f"slot {key} started a job of {mb} MB without asking; its offer was {offer}")
        self._start(key, mb)

    # -- fairness to large jobs

    def head(self, now: float, mb: int | None, since: float | None = None) -> None:
        """The first due job in the order of claims needs `mb`, and has waited for room since then.

        None: no job waits. Without `since` it is taken to wait since a head of its size was first reported. To
        be repeated while it waits: a report holds for 10 s. One larger than the total is for another host.
        """
        if mb is None or mb > self._total:
            self._drop_head()
            return
        known = self._head
        same = known is not None and known.mb == mb and since in (None, known.since)
        if known is None or not same:
            self._drop_head()
            self._head = _Head(mb, now if since is None else since, now)
        else:
            self._head = _Head(mb, known.since, now)
        self._consider_head(now)

    def _consider_head(self, now: float) -> None:
        head = self._head
        if head is None:
            return
        if head.mb > self._total or now - head.reported > _REPORT_HOLDS_SECONDS:
            self._drop_head()
        elif self._older is None and now - head.since >= self._patience:
            self._older = {*self._reserved, *self._offers}

    def _drop_head(self) -> None:
        self._head = self._older = self._server = None

    # -- sums

    def _promises(self) -> dict[Hashable, int]:
        """What each claim that is under way may come to without asking, or has asked for."""
        return {key: max(offer.sure_mb, self._asked.get(key, 0)) for key, offer in self._offers.items()}

    def _could_serve(self, promises: Mapping[Hashable, int]) -> bool:
        """Whether the next offer is to be the one for the head."""
        return 0 < self.kept <= self._total - self.reserved - sum(promises.values()) and self._server is None

    def _room(self, promises: Mapping[Hashable, int], *, serves: bool) -> int:
        """The largest job that could start beside these promises; one that does not serve the head leaves room."""
        room = self._total - self.reserved - sum(promises.values())
        if serves or not self.kept:
            return room
        older = self._older or set()
        younger = sum(mb for key, mb in self._reserved.items() if key not in older)
        younger += sum(mb for key, mb in promises.items() if key not in older and key != self._server)
        return min(room, self._total - self.kept - younger)

    def _start(self, key: Hashable, mb: int) -> None:
        served = self._server == key and mb == self.kept
        self.reserve(key, mb)
        if served:
            self._drop_head()  # the next report names the next one

    def _end_offer(self, key: Hashable) -> None:
        self._offers.pop(key, None)
        self._asked.pop(key, None)
        if self._server == key:
            self._server = None

    def _forget_age(self, key: Hashable) -> None:
        if self._older is not None and key not in self._reserved:
            self._older.discard(key)
