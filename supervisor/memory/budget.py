"""Which worker may claim how large a job, so that what all running jobs reserved stays within the budget.

Pure bookkeeping in MB, kept by the supervisor process: no I/O, no clock. If a worker dies, release its key.

A job's way: the supervisor makes an idle worker an *offer*; the worker claims a job of up to `limit_mb`. One
of up to `sure_mb` starts at once, since the offer holds that much for it; for a larger one the worker asks
(`admit`), because others may have claimed at the same time. Either ends the offer.

A job too large for what is free could wait for ever behind a stream of small ones. So the keeper reports the
first due job, the *head*. Once that has been passed over for `patience` seconds, room is kept for it: jobs
that start from then on get together only what the head leaves over. So it starts at the latest when all that
ran at that moment have ended: after patience and the longest of their remaining runs.
"""

from __future__ import annotations

from collections.abc import Hashable
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
        self._refused = 0
        """The size of a job that was given back only because others held offers: the next offer is sure of it."""
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
        self._consider_head(now)
        if self._paused is not None:
            return None
        if self.kept and self._server is None and self._unpromised(key) >= self.kept:
            self._server = key
        room = self._room(key)
        if room < 1:
            return None
        sure = min(room, max(room // max(1, idle), USUAL_MB))
        if self._server == key:
            sure = max(sure, self.kept)
        if 0 < self._refused <= room:
            sure, self._refused = max(sure, self._refused), 0
        self._offers[key] = Offer(room, sure)
        return self._offers[key]

    def admit(self, key: Hashable, mb: int) -> bool:
        """Whether the job that was claimed fits now: then it is reserved. Else it must be given back."""
        if mb <= self._room(key):
            self._start(key, mb)
            return True
        if mb <= self.free:
            self._refused = max(self._refused, mb)
        self._end_offer(key)
        return False

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

    def _room(self, key: Hashable) -> int:
        """The largest job that this slot could start now."""
        room = self._unpromised(key)
        if self.kept and self._server != key:
            return min(room, self._total - self.kept - self._younger(key))
        return room

    def _unpromised(self, key: Hashable) -> int:
        promised = sum(offer.sure_mb for other, offer in self._offers.items() if other != key)
        return self._total - self.reserved - promised

    def _younger(self, key: Hashable) -> int:
        """What was given since room is kept for the head, to others than the head."""
        older = self._older or set()
        reserved = sum(mb for other, mb in self._reserved.items() if other not in older)
        offers = self._offers.items()
        ignored = {*older, key, self._server}
        return reserved + sum(offer.sure_mb for other, offer in offers if other not in ignored)

    def _start(self, key: Hashable, mb: int) -> None:
        served = self._server == key and mb == self.kept
        self.reserve(key, mb)
        if served:
            self._drop_head()  # the next report names the next one

    def _end_offer(self, key: Hashable) -> None:
        self._offers.pop(key, None)
        if self._server == key:
            self._server = None

    def _forget_age(self, key: Hashable) -> None:
        if self._older is not None and key not in self._reserved:
            self._older.discard(key)
