"""Which workers look at the queue, and when: one for each job that became due, as far as the memory budget goes.

    keeper ──Wake──► Claims ──Claim(up to so many MB)──► idle worker ──Claimed, NothingDue──► Claims ──Admit, Refuse──►

No database and no process is touched here: slots and messages only. Whoever becomes idle after a job looks by itself;
who found something has another one look; and whenever there is room for a larger job than the last look could have
found, somebody looks again. So no job waits while there is a worker and memory for it; one new job wakes one worker.
"""

from __future__ import annotations

from dataclasses import dataclass

from supervisor.memory.budget import Budget
from supervisor.messages import AHEAD_SECONDS, Admit, Claim, Claimed, NothingDue, Refuse, Released
from supervisor.pool import Slot, SlotState, WorkerPool
from supervisor.processes import clock

ANSWER_SECONDS = 1.0
"""A claimed job waits no longer to hear whether it may start: another worker's claim may hang."""
MAX_AHEAD = 32
CAUTIOUS_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Question:
    """A worker has claimed a job, and waits to hear whether it fits into the budget."""

    slot: Slot
    asked_at: float


class Claims:
    """Grants claims to the slots of a pool."""

    def __init__(self, pool: WorkerPool, budget: Budget) -> None:
        self.announced = 0
        """Jobs that have become due, and nobody looked for yet."""
        self._pool = pool
        self._budget = budget
        self._grants = 0
        self._asking: dict[int, Question] = {}
        """Grants whose workers have claimed, and wait for an answer."""
        self._looked_mb = 0
        """How large a job could have been that the last look at the queue would have found."""
        self._claiming_ahead: int | None = None
        self._cautious_until = 0.0

    # -- why to look --------------------------------------------------------------------------------------------------

    def wake(self, count: int) -> None:
        """So many jobs have become due; with 0, some may have."""
        if count:
            self.announced += count
        else:
            self.look()

    def look(self) -> None:
        """One idle worker looks; when it finds something, the next one does."""
        self._ask_another()
        self._look_again()

    def head(self, memory_mb: int | None) -> None:
        """The first due job needs so much; None: nothing waits."""
        kept = self._budget.kept
        self._budget.head(clock(), memory_mb)
        if self._budget.kept < kept:
            self.look()

    def _look_again(self) -> None:
        """A claim that is under way may have looked before what is announced now was there."""
        for slot in self._pool.slots.values():
            slot.asks_again = slot.asks_again or slot.claiming is not None

    def _ask_another(self) -> None:
        for slot in self._pool.slots.values():
            if slot.state is SlotState.IDLE and not slot.asks:
                slot.asks = True
                return

    # -- what workers say ---------------------------------------------------------------------------------------------

    def claimed(self, claimed: Claimed, slot: Slot) -> None:
        self._answered(slot, claimed.grant)
        slot.grants.add(claimed.grant)
        slot.update_state()
        memory_mb = sum(job.memory_mb for job in claimed.jobs)  # all of them are `running` in MongoDB
        if claimed.waits:
            self._budget.ask(claimed.grant, memory_mb)
            self._asking[claimed.grant] = Question(slot, clock())
        else:
            self._budget.settle(claimed.grant, memory_mb)
        if slot.asks:  # found by looking, not announced: there may be more
            self._ask_another()

    def nothing_due(self, nothing: NothingDue, slot: Slot) -> None:
        self._answered(slot, nothing.grant)
        self._budget.settle(nothing.grant, None)
        slot.asks, slot.asks_again, slot.hungry = slot.asks_again, False, False
        slot.update_state()
        if nothing.error is not None:
            self.announced = 0

    def released(self, released: Released, slot: Slot) -> None:
        slot.grants.discard(released.grant)
        slot.update_state()
        if slot.state is SlotState.IDLE:
            slot.asks = True

    def written(self, grant: int) -> None:
        """MongoDB knows that no job of the grant runs any more: its memory is free."""
        self._budget.release(grant)

    def slot_gone(self, slot: Slot) -> None:
        """Nothing of it is left, and so nothing that it held is in use."""
        for grant in {*slot.grants, slot.claiming}:
            if grant is not None:
                self._answered(slot, grant)
                self._asking.pop(grant, None)
                self._budget.release(grant)
        if slot.crashed:
            self._cautious_until = clock() + CAUTIOUS_SECONDS

    def _answered(self, slot: Slot, grant: int) -> None:
        slot.claiming = None
        if self._claiming_ahead == grant:
            self._claiming_ahead = None

    # -- what workers hear --------------------------------------------------------------------------------------------

    def answer(self, *, may_start: bool) -> None:
        """Tells workers whether what they have claimed may start; what may not is handed back."""
        if not self._asking:
            return
        answers = dict(self._budget.answers())
        for grant, question in list(self._asking.items()):
            waited = grant not in answers and clock() - question.asked_at > ANSWER_SECONDS
            if waited or not may_start:
                self._budget.settle(grant, None)
                answers[grant] = False
            if grant in answers:
                question.slot.worker.send(Admit(grant) if answers[grant] else Refuse(grant))
                del self._asking[grant]

    def grant(self) -> None:
        """Has idle workers look, where there is a reason to."""
        up = [slot for slot in self._pool.slots.values() if slot.generation == self._pool.generation]
        idle = [slot for slot in up if slot.state is SlotState.IDLE]
        idle.sort(key=lambda slot: not slot.asks)  # one that looks anyway spares the others the look for more memory
        for count, slot in enumerate(idle):
            if slot.asks or self.announced or self._budget.room(clock()) > self._looked_mb:
                self._looked_mb = self._grant(slot, idle=len(idle) - count)
        if any(slot.state is SlotState.IDLE for slot in up):
            return
        if self.announced:
            self._look_again()
            self.announced = 0  # nobody is idle, and whoever becomes idle after a job looks by itself
        for slot in up:
            if slot.hungry and slot.state is SlotState.BUSY and slot.claiming is None and self._may_claim_ahead():
                self._looked_mb = min(self._looked_mb, self._grant(slot, idle=1))

    def _grant(self, slot: Slot, *, idle: int) -> int:
        """Lets a worker claim, as much as there is room for; returns the limit in MB, 0 where it may not."""
        count = self._how_many(slot, idle)
        self._grants += 1
        offer = self._budget.offer(clock(), self._grants, idle=idle)
        if offer is None:
            return 0
        share_mb = offer.limit_mb // max(1, len(self._pool.slots))  # the others want to claim, too
        if not slot.worker.send(Claim(self._grants, offer.limit_mb, offer.sure_mb, count, share_mb)):
            self._budget.settle(self._grants, None)
            return 0
        if not slot.asks and not slot.hungry:
            self.announced = max(0, self.announced - 1)
        slot.claiming, slot.asks_again, slot.hungry = self._grants, False, False
        slot.update_state()
        if count > 1:
            self._claiming_ahead = self._grants
        return offer.limit_mb

    def _may_claim_ahead(self) -> bool:
        """One worker at a time claims several jobs: two would take them from each other. None does after a crash,
        whose cause may be the next job: claimed alone, it counts against that job."""
        return self._claiming_ahead is None and clock() >= self._cautious_until

    def _how_many(self, slot: Slot, idle: int) -> int:
        """Several jobs at once where they are short and nobody else would take them sooner."""
        if idle > 1 or not self._may_claim_ahead():
            return 1
        return max(1, min(MAX_AHEAD, int(AHEAD_SECONDS / max(slot.mean_seconds, 0.001))))
