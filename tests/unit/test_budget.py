"""Admission by memory: what is promised, what is kept for a large job, and how long that has to wait."""

from __future__ import annotations

import heapq
import random
from collections.abc import Hashable
from dataclasses import dataclass, field

import pytest

from supervisor.memory.budget import Budget, Offer

TOTAL = 1024


def budget_with(*reserved: int, total: int = TOTAL, patience: float = 10.0) -> Budget:
    """A budget in which jobs of these sizes run, in slots 100, 101, ..."""
    budget = Budget(total, patience)
    for slot, mb in enumerate(reserved, start=100):
        budget.reserve(slot, mb)
    return budget


@pytest.mark.parametrize(
    ("reserved", "idle", "expected"),
    [
        ((), 1, Offer(1024, 1024)),
        ((), 4, Offer(1024, 256)),
        ((), 0, Offer(1024, 1024)),
        ((512,), 2, Offer(512, 256)),
        ((512,), 100, Offer(512, 128)),  # less than the usual job is no use to anybody
        ((924,), 2, Offer(100, 100)),
        ((1023,), 1, Offer(1, 1)),
        ((1024,), 1, None),
        ((600, 600), 1, None),
    ],
)
def test_an_offer_is_a_fair_share_of_what_is_free(reserved: tuple[int, ...], idle: int, expected: Offer | None) -> None:
    assert budget_with(*reserved).offer(0, "slot", idle) == expected


def test_offers_to_several_never_promise_more_than_is_free() -> None:
    budget = budget_with(24)
    offers = [budget.offer(0, slot, 4 - slot) for slot in range(4)]
    assert [offer and offer.limit_mb for offer in offers] == [1000, 750, 500, 250]
    assert sum(offer.sure_mb for offer in offers if offer) == 1000
    assert budget.offer(0, "fifth", 1) is None


def test_a_second_offer_to_a_slot_takes_the_place_of_the_first() -> None:
    budget = Budget(TOTAL)
    assert budget.offer(0, 1, 1) == budget.offer(0, 1, 1) == Offer(1024, 1024)


def test_what_an_offer_held_beyond_the_job_is_free_again() -> None:
    budget = Budget(TOTAL)
    budget.offer(0, 1, 1)
    assert budget.offer(0, 2, 1) is None
    budget.settle(1, 100)
    assert (budget.reserved, budget.free) == (100, 924)
    assert budget.offer(0, 2, 1) == Offer(924, 924)
    budget.settle(2, None)
    assert budget.reserved == 100
    budget.release(1)
    assert budget.free == TOTAL


def test_a_job_that_starts_without_asking_must_be_within_its_sure_part() -> None:
    budget = Budget(TOTAL)
    budget.offer(0, 1, 4)
    with pytest.raises(ValueError, match="257 MB without asking"):
        budget.settle(1, 257)
    with pytest.raises(ValueError, match="without asking"):
        budget.settle("nobody", 1)
    assert budget.reserved == 0


def test_a_large_job_waits_for_what_others_find() -> None:
    budget = Budget(TOTAL)
    for slot in (1, 2):
        budget.offer(0, slot, 3 - slot)  # sure of 512 each
    budget.ask(1, 700)
    assert budget.answers() == [], "the other may start 512 at any moment"
    assert budget.offer(0, 3, 1) is None, "and nobody else may take what both may need"
    budget.settle(2, None)
    assert budget.answers() == [(1, True)]
    assert budget.answers() == []
    assert budget.reserved == 700


def test_a_large_job_is_given_back_when_others_have_taken_its_room() -> None:
    budget = Budget(TOTAL)
    for slot in (1, 2):
        budget.offer(0, slot, 3 - slot)
    budget.ask(1, 700)
    budget.settle(2, 512)
    assert budget.answers() == [(1, False)]
    assert budget.offer(0, 3, 1) == Offer(512, 512), "the refused one holds nothing any more"


def test_of_workers_that_all_ask_the_first_go_first() -> None:
    budget = Budget(256)
    slots = [slot for slot in range(4) if budget.offer(0, slot, 4 - slot)]
    assert slots == [0, 1]
    for slot in reversed(slots):
        budget.ask(slot, 200)
    assert budget.answers() == [(0, True), (1, False)]
    assert budget.reserved == 200


def test_a_later_question_does_not_overtake_an_earlier_one() -> None:
    budget = Budget(TOTAL)
    for slot in range(3):
        budget.offer(0, slot, 4 - slot)  # sure of 256 each
    budget.ask(0, 900)
    budget.ask(1, 300)
    assert budget.answers() == [], "beside the 900 and what the last one may find there is no room for 300"
    budget.release(0)
    assert budget.answers() == [(1, True)], "a dead worker asks nothing"


def test_a_dead_worker_holds_nothing() -> None:
    budget = budget_with(500)
    budget.offer(0, 1, 1)
    budget.release(1)
    budget.release(100)
    budget.release("unknown")
    assert budget.offer(0, 2, 1) == Offer(1024, 1024)


def test_resizing_leaves_running_jobs_alone() -> None:
    budget = budget_with(800)
    budget.resize(500)
    assert (budget.total, budget.reserved, budget.free) == (500, 800, 0)
    assert budget.offer(0, 1, 1) is None
    budget.resize(1000)
    assert budget.offer(0, 1, 1) == Offer(200, 200)


def test_nothing_is_offered_while_paused() -> None:
    budget = Budget(TOTAL)
    budget.offer(0, 1, 2)
    budget.pause("the host is short of memory")
    assert budget.paused == "the host is short of memory"
    assert budget.offer(0, 2, 1) is None
    budget.settle(1, 100)  # made before: it holds
    budget.resume()
    assert budget.paused is None
    assert budget.offer(0, 2, 1) == Offer(924, 924)


class TestHead:
    """Room for the first due job that does not fit."""

    def test_small_jobs_pass_until_patience_is_over(self) -> None:
        budget = budget_with(600)
        budget.head(0, 800)
        assert budget.offer(9.9, 1, 1) == Offer(424, 424)
        assert budget.kept == 0

    def test_then_others_get_together_only_what_it_leaves_over(self) -> None:
        budget = budget_with(600)
        budget.head(0, 800)
        budget.head(10, 800)
        assert budget.kept == 800
        assert budget.offer(10, 1, 1) == Offer(224, 224)
        budget.settle(1, 200)
        assert budget.offer(10, 2, 1) == Offer(24, 24)
        budget.ask(2, 25)
        assert budget.answers() == [(2, False)]

    def test_as_soon_as_it_fits_one_offer_is_made_for_it(self) -> None:
        budget = budget_with(600)
        budget.head(0, 800)
        budget.head(10, 800)
        budget.release(100)
        assert budget.offer(10, 1, 8) == Offer(1024, 800), "sure of the whole, although eight are idle"
        assert budget.offer(10, 2, 7) == Offer(224, 128), "and beside it only what it leaves"
        budget.settle(1, 800)
        assert budget.kept == 0

    def test_when_another_takes_that_offer_room_is_kept_on(self) -> None:
        budget = budget_with()
        budget.head(0, 800, since=-60)
        budget.offer(0, 1, 1)
        budget.settle(1, 300)  # a job of higher priority came in between
        assert budget.kept == 800
        assert budget.offer(0, 2, 1) is None
        budget.release(1)
        assert budget.offer(0, 2, 1) == Offer(1024, 1024)

    def test_a_slot_that_begins_anew_is_no_older_one(self) -> None:
        budget = budget_with(200, 400)
        budget.head(0, 800, since=-60)
        budget.release(100)
        budget.offer(0, 100, 1)
        budget.settle(100, 200)
        assert budget.offer(0, 1, 1) == Offer(24, 24)

    def test_an_offer_that_was_out_already_counts_as_older(self) -> None:
        budget = budget_with(600)
        budget.offer(0, 1, 1)
        budget.head(0, 800, since=-60)
        budget.settle(1, 200)
        assert budget.offer(0, 2, 1) == Offer(224, 224)

    @pytest.mark.parametrize("mb", [None, 1025])
    def test_no_room_is_kept_when_nothing_waits_or_it_can_never_fit(self, mb: int | None) -> None:
        budget = budget_with(600)
        budget.head(0, 800, since=-60)
        budget.head(0, mb, since=-60)
        assert budget.kept == 0
        assert budget.offer(0, 1, 1) == Offer(424, 424)

    def test_no_room_is_kept_for_what_is_larger_than_a_smaller_budget(self) -> None:
        budget = budget_with(600)
        budget.head(0, 800, since=-60)
        budget.resize(700)
        assert budget.offer(0, 1, 1) == Offer(100, 100)

    def test_another_head_has_its_own_patience(self) -> None:
        budget = budget_with(600)
        budget.head(0, 800)
        budget.head(9, 900)
        budget.head(11, 900)
        assert budget.kept == 0
        budget.head(19, 900)
        assert budget.kept == 900

    def test_a_report_that_is_not_repeated_is_forgotten(self) -> None:
        budget = budget_with(600)
        budget.head(0, 800, since=-60)
        assert budget.offer(9, 1, 1) == Offer(224, 224)
        assert budget.offer(11, 1, 1) == Offer(424, 424)


# -- a mixed stream, by simulation ------------------------------------------------------------------------------------


@dataclass(order=True)
class Job:
    due: float
    number: int
    mb: int = field(compare=False)
    run: float = field(compare=False)
    started: float = field(default=-1.0, compare=False)

    @property
    def wait(self) -> float:
        return self.started - self.due


@dataclass
class Pool:
    """Workers with one budget and a queue in order of due time, as discrete events; checks the sum at each."""

    budget: Budget
    slots: int
    jobs: list[Job]
    reports_heads: bool = True
    now: float = 0.0
    used_mb_seconds: float = 0.0
    _queue: list[Job] = field(default_factory=list)
    _idle: list[int] = field(default_factory=list)

    @property
    def utilisation(self) -> float:
        return self.used_mb_seconds / (self.now * self.budget.total)

    def run(self) -> None:
        self._idle = list(range(self.slots))
        order = random.Random(7)
        events: list[tuple[float, int, Job | int]] = [(job.due, job.number, job) for job in self.jobs]
        events += [(float(second), -1, 0) for second in range(int(self.jobs[-1].due) + 5000)]
        heapq.heapify(events)
        running: dict[int, Job] = {}
        ends: list[tuple[float, int]] = []
        while events or ends:
            if not self._queue and not ends and all(event[1] == -1 for event in events):
                break
            if ends and (not events or ends[0][0] <= events[0][0]):
                self._pass_to(ends[0][0])
                _, slot = heapq.heappop(ends)
                del running[slot]
                self.budget.release(slot)
                self._idle.append(slot)
            else:
                self._pass_to(events[0][0])
                _, _, event = heapq.heappop(events)
                if isinstance(event, Job):
                    heapq.heappush(self._queue, event)
            if self.reports_heads:
                self.budget.head(self.now, self._queue[0].mb if self._queue else None)
            order.shuffle(self._idle)
            for slot, job in self._claim_all():
                running[slot] = job
                heapq.heappush(ends, (self.now + job.run, slot))
            assert self.budget.reserved == sum(job.mb for job in running.values()) <= self.budget.total

    def _pass_to(self, now: float) -> None:
        self.used_mb_seconds += self.budget.reserved * (now - self.now)
        self.now = now

    def _claim_all(self) -> list[tuple[int, Job]]:
        """All idle workers claim at the same time: every offer is made before the first is answered."""
        started: list[tuple[int, Job]] = []
        offers = [
            (slot, self.budget.offer(self.now, slot, len(self._idle) - count)) for count, slot in enumerate(self._idle)
        ]
        asked: dict[Hashable, tuple[int, Job]] = {}
        for slot, offer in offers:
            job = self._take_first_up_to(offer.limit_mb) if offer is not None else None
            if job is None or offer is None:
                self.budget.settle(slot, None)
            elif job.mb > offer.sure_mb:
                self.budget.ask(slot, job.mb)
                asked[slot] = slot, job
            else:
                self.budget.settle(slot, job.mb)
                started.append((slot, job))
        for key, fits in self.budget.answers():
            slot, job = asked.pop(key)
            if fits:
                started.append((slot, job))
            else:
                heapq.heappush(self._queue, job)
        assert not asked, "when all have claimed, all are answered"
        for _, job in started:
            job.started = self.now
        self._idle = [slot for slot in self._idle if slot not in {slot for slot, _ in started}]
        return started

    def _take_first_up_to(self, limit_mb: int) -> Job | None:
        job = min((job for job in self._queue if job.mb <= limit_mb), default=None)
        if job is not None:
            self._queue.remove(job)
            heapq.heapify(self._queue)
        return job


def mixed_stream(seed: int, jobs: int, load: float, total: int) -> list[Job]:
    """80 % small, 15 % medium and 5 % large jobs, arriving so that they need `load` of the budget on average."""
    dice = random.Random(seed)
    stream, due = [], 0.0
    for number in range(jobs):
        mb = dice.choices([128, 512, 3072], [80, 15, 5])[0]
        run = min(60.0, dice.expovariate(1 / 10))
        due += dice.expovariate(1.0) * mb * 10 / (total * load)
        stream.append(Job(due, number, mb, run))
    return stream


def mean_wait(pool: Pool, mb: int) -> float:
    waits = [job.wait for job in pool.jobs if job.mb == mb]
    return sum(waits) / len(waits)


def simulate(seed: int, *, load: float, reports_heads: bool = True, patience: float = 10.0) -> Pool:
    pool = Pool(Budget(4096, patience), 16, mixed_stream(seed, 1500, load, 4096), reports_heads)
    pool.run()
    assert all(job.started >= job.due for job in pool.jobs), "every job ran"
    return pool


@pytest.mark.parametrize("seed", range(3))
def test_a_mixed_stream_is_packed_well(seed: int) -> None:
    pool = simulate(seed, load=0.6)
    assert pool.used_mb_seconds == pytest.approx(sum(job.mb * job.run for job in pool.jobs))
    # More than can be done at once: keeping room for the large ones costs nothing in the end.
    fair, greedy = (simulate(seed, load=2.0, reports_heads=fairly) for fairly in (True, False))
    assert fair.utilisation > 0.7
    assert fair.utilisation > 0.98 * greedy.utilisation
    assert mean_wait(fair, 3072) < 0.9 * mean_wait(greedy, 3072)


LONGEST_RUN = 30.0


def stream_that_starves(seed: int) -> tuple[list[Job], Job]:
    """Small jobs that on average need 80 % of the memory, without an end, and one that needs nearly all of it."""
    dice = random.Random(seed)
    stream = [Job(number * 1.2, number, 256, dice.uniform(1, LONGEST_RUN)) for number in range(1000)]
    large = Job(200.25, 9999, 4000, 5.0)
    return sorted([*stream, large]), large


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("patience", [0.0, 10.0])
def test_the_largest_job_waits_no_longer_than_patience_and_the_longest_run(seed: int, patience: float) -> None:
    stream, large = stream_that_starves(seed)
    Pool(Budget(4096, patience), 24, stream).run()
    first_in_line = max(large.due, *(job.started for job in stream if job.due < large.due))
    between_reports = 1.0
    assert large.started - first_in_line <= patience + LONGEST_RUN + between_reports


def test_without_reports_of_the_head_the_same_large_job_starves() -> None:
    """The stream above is hard enough to show that fairness does something."""
    stream, large = stream_that_starves(0)
    Pool(Budget(4096), 24, stream, reports_heads=False).run()
    assert large.wait > 900
