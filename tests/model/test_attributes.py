"""PrivateSet against a plain set of pages, and its cost where a bitmap per page would not do."""

from __future__ import annotations

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from kvmapi.model.attributes import PrivateSet

CHUNK = 1 << 24
# Small numbers around the borders of chunks: every way to cut a chunk is met.
EDGES = st.sampled_from([0, CHUNK - 3, CHUNK, CHUNK + 5, 2 * CHUNK - 1, 2 * CHUNK, 3 * CHUNK])
STEPS = st.lists(st.tuples(EDGES, st.integers(0, 4), EDGES, st.integers(0, 4), st.booleans()), max_size=12)


class Naive:
    """Private half-open ranges, by brute force over the points where anything can change."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int, bool]] = []

    def __contains__(self, gfn: int) -> bool:
        return next((private for first, last, private in reversed(self.steps) if first <= gfn < last), False)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_against_a_naive_model(steps: list[tuple[int, int, int, int, bool]]) -> None:
    real, naive = PrivateSet(), Naive()
    points = {0, CHUNK - 1, CHUNK, 2 * CHUNK, 3 * CHUNK + 9}
    for edge, near, other, far, private in steps:
        first, last = sorted((edge + near, other + far))
        if first == last:
            last += 1
        points |= {first - 1, first, last - 1, last, (first + last) // 2} - {-1}
        # "changed" is exact: what the naive model would have to change, at the points and between them
        cuts = sorted({first, last, *(cut for step in naive.steps for cut in step[:2] if first < cut < last)})
        expected = any((cut in naive) != private for cut in cuts[:-1])
        assert real.set_range(first, last - first, private) == expected
        naive.steps.append((first, last, private))
        assert all((point in real) == (point in naive) for point in points)


def test_the_whole_address_space_is_cheap() -> None:
    private = PrivateSet()
    start = time.perf_counter()
    assert private.set_range(0, (1 << 52) - 1, True)
    assert private.set_range(12345, 1, False) and 12345 not in private and 12346 in private
    assert (1 << 52) - 2 in private and (1 << 52) - 1 not in private
    assert private.set_range(0, (1 << 52) - 1, False) and not private.set_range(0, (1 << 52) - 1, False)
    assert time.perf_counter() - start < 1
