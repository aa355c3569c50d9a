"""The GPA map against a dictionary that does the same slowly, and its costs."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import PATIENCE
from vmm.checks import PAGE_SIZE
from vmm.gpamap import MAX_SLOT_PAGES, GpaMap

# slots of the model: (number, first page, pages, private); 0 and 1 touch, 2 stands apart and is bigger than a Roaring container
SLOTS = ((0, 0, 24, False), (1, 24, 16, True), (2, 100, 70_000, False))
PAGES = [page for _, first, count, _ in SLOTS for page in range(first, first + count)]

operations = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 200), st.integers(65_600, 65_700), st.integers(70_050, 70_150)),
        st.one_of(st.just(1), st.integers(1, 40), st.integers(1, 70_000)),
        st.booleans(),
    ),
    max_size=30,
)


def build() -> tuple[GpaMap, dict[int, bool]]:
    m = GpaMap()
    for slot, first, count, private in SLOTS:
        m.add_slot(slot, first * PAGE_SIZE, count * PAGE_SIZE, private)
    return m, {page: private for _, first, count, private in SLOTS for page in range(first, first + count)}


def covered(pages: dict[int, bool], first: int, count: int) -> bool:
    return all(page in pages for page in range(first, first + count))


@settings(max_examples=60, deadline=None)
@given(operations)
def test_like_a_dictionary(steps: list[tuple[int, int, bool]]) -> None:
    m, pages = build()
    for first, count, private in steps:
        if covered(pages, first, count):
            if count == 1:
                m.set_page(first, private)
            else:
                m.set_range(first * PAGE_SIZE, count * PAGE_SIZE, private)
            pages.update((page, private) for page in range(first, first + count))
        else:
            with pytest.raises(KeyError):
                m.set_range(first * PAGE_SIZE, count * PAGE_SIZE, private)
    assert m.private_pages() == sum(pages.values())
    seen: dict[int, bool] = {}
    for r in m.ranges():
        seen.update((page, r.state == "private") for page in range(r.gpa // PAGE_SIZE, (r.gpa + r.size) // PAGE_SIZE))
    assert seen == pages
    m.run_optimize()
    for page in (0, 23, 24, 39, 40, 99, 100, 70_099, 70_100):
        assert m.is_private(page * PAGE_SIZE + 5) is pages.get(page, False)


def test_runs_are_as_long_as_they_can_be_and_end_with_their_slot() -> None:
    m, _ = build()
    m.set_range(10 * PAGE_SIZE, 20 * PAGE_SIZE, True)
    shapes = [(r.gpa // PAGE_SIZE, r.size // PAGE_SIZE, r.state, r.slot) for r in m.ranges()]
    assert shapes == [(0, 10, "shared", 0), (10, 14, "private", 0), (24, 16, "private", 1), (100, 70_000, "shared", 2)]
    assert next(m.ranges()).to_json() == {"gpa": 0, "size": 10 * PAGE_SIZE, "state": "shared", "slot": 0}
    assert [(r.gpa, r.size) for r in m.ranges(12 * PAGE_SIZE, 2 * PAGE_SIZE)] == [(12 * PAGE_SIZE, 2 * PAGE_SIZE)]


def test_a_range_that_leaves_the_slots_changes_nothing() -> None:
    m, _ = build()
    before = list(m.ranges())
    with pytest.raises(KeyError, match="0x28000"):
        m.set_range(0, 41 * PAGE_SIZE, True)
    with pytest.raises(KeyError):
        m.set_page(41, True)
    with pytest.raises(KeyError):
        m.set_page(-1, True)
    assert list(m.ranges()) == before


def test_a_removed_slot_is_forgotten_even_when_it_was_used_last() -> None:
    m, _ = build()
    m.set_page(30, False)
    m.remove_slot(1)
    with pytest.raises(KeyError):
        m.set_page(30, True)
    assert m.slot_of(30 * PAGE_SIZE) is None
    assert m.covered_until(0) == 24 * PAGE_SIZE
    m.add_slot(1, 24 * PAGE_SIZE, 16 * PAGE_SIZE)
    assert not m.is_private(30 * PAGE_SIZE)
    with pytest.raises(KeyError):
        m.remove_slot(7)


def test_how_far_slots_reach_is_asked_again_when_slots_change() -> None:
    m, _ = build()
    assert m.covered_until(5 * PAGE_SIZE) == m.covered_until(39 * PAGE_SIZE) == 40 * PAGE_SIZE
    assert m.covered_until(40 * PAGE_SIZE) == 40 * PAGE_SIZE, "behind the last page is a hole"
    m.add_slot(3, 40 * PAGE_SIZE, PAGE_SIZE)
    assert m.covered_until(5 * PAGE_SIZE) == 41 * PAGE_SIZE
    assert m.covered_until(100 * PAGE_SIZE) == 70_100 * PAGE_SIZE
    assert m.covered_until(0) == 41 * PAGE_SIZE and m.covered_until(99 * PAGE_SIZE) == 99 * PAGE_SIZE
    m.remove_slot(1)
    assert m.covered_until(5 * PAGE_SIZE) == 24 * PAGE_SIZE and m.covered_until(30 * PAGE_SIZE) == 30 * PAGE_SIZE


@pytest.mark.parametrize(
    ("slot", "gpa", "size", "word"),
    [
        (3, 0x1000, 0x1000, "overlaps"),
        (3, 99 * PAGE_SIZE, 2 * PAGE_SIZE, "overlaps"),
        (2, 1 << 40, PAGE_SIZE, "in the map already"),
        (3, 1 << 40, 0, "empty"),
        (3, (1 << 40) + 1, PAGE_SIZE, "aligned"),
        (3, (1 << 52) - PAGE_SIZE, 2 * PAGE_SIZE, "2\\^52"),
        (3, 1 << 47, (MAX_SLOT_PAGES + 1) * PAGE_SIZE, "16 TiB"),
    ],
)
def test_impossible_slots_are_refused(slot: int, gpa: int, size: int, word: str) -> None:
    m, _ = build()
    with pytest.raises(ValueError, match=word):
        m.add_slot(slot, gpa, size)


def test_a_guest_that_flips_every_other_page_of_64_gib_costs_seconds_and_3_mib() -> None:
    psutil = pytest.importorskip("psutil")
    process = psutil.Process()
    m = GpaMap()
    m.add_slot(0, 0, 64 << 30)
    before = process.memory_info().rss
    began = time.perf_counter()
    flip = m.set_page
    for gfn in range(0, 1 << 24, 2):
        flip(gfn, True)
    elapsed = time.perf_counter() - began
    growth = process.memory_info().rss - before
    assert m.private_pages() == 1 << 23
    assert growth <= 3 << 20, f"{growth / 2**20:.1f} MiB"
    assert elapsed <= 4 * PATIENCE, f"{elapsed:.2f} s"
