"""What outlives a keeper."""

from __future__ import annotations

import copy
import os

from supervisor.totals import Totals


def successor(totals: Totals) -> Totals:
    """The same memory in a process that has not kept anything yet, as after a fork."""
    other = copy.copy(totals)
    other._serial = 0
    return other


def test_what_was_kept_last_is_found_by_the_next_process() -> None:
    totals = Totals()
    assert totals.kept() is None
    for text in (b"one", b"two", b"three"):
        totals.keep(text)
        assert successor(totals).kept() == text
    following = successor(totals)
    assert following.kept() == b"three"
    following.keep(b"four")
    assert successor(totals).kept() == b"four"


def test_a_copy_that_was_not_written_to_its_end_does_not_count() -> None:
    totals = Totals()
    totals.keep(b"whole")
    totals.keep(b"broken" * 100)
    os.pwrite(totals.fileno(), b"?", 100)  # the second copy is at the beginning
    assert successor(totals).kept() == b"whole"


def test_what_is_too_large_is_not_kept() -> None:
    totals = Totals()
    totals.keep(b"small")
    totals.keep(b"x" * (1 << 20))
    assert successor(totals).kept() == b"small"
