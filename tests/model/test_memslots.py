"""Memslots' overlap test and look-up against a list of ranges."""

from __future__ import annotations

from errno import EEXIST

from hypothesis import given, settings
from hypothesis import strategies as st

from kvmapi.model.caller import PAGE, Errno
from kvmapi.model.memslots import Memslots, Request

STEP = st.tuples(st.integers(0, 6), st.integers(0, 40), st.integers(0, 8))


@settings(max_examples=200, deadline=None)
@given(st.lists(STEP, max_size=25))
def test_against_a_list(steps: list[tuple[int, int, int]]) -> None:
    slots = Memslots(readonly_allowed=True)
    naive: dict[int, tuple[int, int]] = {}
    for number, gfn, pages in steps:
        if pages == 0:
            if number in naive:
                slots.drop(number)
                del naive[number]
            continue
        if number in naive and naive[number][1] != pages:
            continue  # a change of size is refused before overlap is looked at
        clash = any(other != number and first < gfn + pages and gfn < first + count for other, (first, count) in naive.items())
        try:
            old, new = slots.check(Request(number, 0, gfn * PAGE, pages * PAGE, 0x100000))
        except Errno as failure:
            assert failure.number == EEXIST and clash
            continue
        assert not clash or (old is None and new is None)
        if new is not None:
            slots.put(new)
            naive[number] = (gfn, pages)
        for page in range(50):
            found = slots.find(page)
            expected = [other for other, (first, count) in naive.items() if first <= page < first + count]
            assert ([found.id] if found is not None else []) == expected
            assert found is None or found.hva_of(page) == 0x100000 + (page - naive[found.id][0]) * PAGE
    assert len(slots) == len(naive)
