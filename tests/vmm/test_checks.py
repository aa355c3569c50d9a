"""Numbers that a guest names: what is believed, what is refused, and with which errno."""

import errno
import time

import pytest

from vmm.checks import GPA_LIMIT, PAGE_SIZE, BadRange, check_map_gpa_range, check_pages, check_range
from vmm.gpamap import GpaMap

MEMORY = 16 << 20


@pytest.fixture
def slots() -> GpaMap:
    """Two slots that touch, [0, 16 MiB) together, and one at 4 GiB."""
    m = GpaMap()
    m.add_slot(0, 0, MEMORY // 2)
    m.add_slot(1, MEMORY // 2, MEMORY // 2)
    m.add_slot(2, 1 << 32, MEMORY)
    return m


def test_good_ranges_come_back_as_they_are(slots: GpaMap) -> None:
    r = check_range(0x3000, 0x2000, slots)
    assert (r.gpa, r.size, r.end, r.gfn, r.pages) == (0x3000, 0x2000, 0x5000, 3, 2)
    assert str(r) == "[0x3000, 0x5000)"
    assert check_pages(0, MEMORY // PAGE_SIZE, slots).size == MEMORY, "touching slots count as one"


@pytest.mark.parametrize(
    ("gpa", "pages", "word"),
    [
        (0x3001, 1, "aligned"),
        (0x3000, 0, "empty"),
        (0x3000, 1 << 52, "2^52"),
        (0x3000, (1 << 64) - 1, "2^52"),
        ((1 << 64) - 0x1000, 2, "2^52"),
        (GPA_LIMIT - 0x1000, 1, "memslots"),
        (MEMORY, 1, "memslots"),
        (MEMORY - 0x1000, 2, "leaves the memslots at 0x1000000"),
        (0, (1 << 32) // PAGE_SIZE + 1, "memslots"),
        (-0x1000, 1, "negative"),
    ],
)
def test_bad_ranges_give_einval_and_a_sentence(slots: GpaMap, gpa: int, pages: int, word: str) -> None:
    with pytest.raises(BadRange, match=word.replace("^", r"\^")) as caught:
        check_pages(gpa, pages, slots)
    assert caught.value.code == -errno.EINVAL


def test_a_size_that_is_no_multiple_of_a_page_is_refused(slots: GpaMap) -> None:
    with pytest.raises(BadRange, match="multiple"):
        check_range(0, 0x1800, slots)


@pytest.mark.parametrize("attributes", [1 << 5, 1 << 63, 3, 0xF, 0x13])
def test_unknown_attribute_bits_are_refused(slots: GpaMap, attributes: int) -> None:
    with pytest.raises(BadRange) as caught:
        check_map_gpa_range(0, 1, attributes, slots)
    assert caught.value.code == -errno.EINVAL


@pytest.mark.parametrize(("attributes", "private"), [(0x10, True), (0, False), (0x11, True), (2, False)])
def test_known_attributes_say_what_the_range_becomes(slots: GpaMap, attributes: int, private: bool) -> None:
    assert check_map_gpa_range(0x1000, 1, attributes, slots)[1] is private


def test_the_largest_numbers_cost_what_small_ones_cost(slots: GpaMap) -> None:
    began = time.perf_counter()
    for _ in range(1000):
        with pytest.raises(BadRange):
            check_pages(0, 1 << 52, slots)
    assert time.perf_counter() - began < 1
