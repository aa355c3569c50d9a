"""Conversions between private and shared memory: how many a second, from the guest's request to its next instruction.

Explicit: MAP_GPA_RANGE, with all that `sevmm run` does about it (checks, backing, attributes, map, history). The value is
that of the slowest type of guest; `detail` has each. Implicit: the first touch of a page, a memory-fault exit and the
instruction again (misses.py). The floors are what was promised of a single conversion elsewhere, or for 2 MiB what
populating and punching that much memory leaves.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from benchlib import misses, tiny
from benchlib.entry import Measured, entry, interleaved, median, need
from benchlib.trips import round_trip

ROUNDS = 5
TYPES = ("sw-protected", "sev")
LARGE = 512  # pages of 4 KiB


def _explicit(pages: int, few: int, many: int) -> Measured:
    need("model")
    code = partial(tiny.map_loop, pages=pages, gpa=0x800000)
    with ExitStack() as stack:
        sides = [stack.enter_context(round_trip(code, few, many, type=type, on="model", exit_name="HYPERCALL")) for type in TYPES]
        costs = dict(zip(TYPES, interleaved(ROUNDS, *sides), strict=True))
    rates = {type: 1e6 / median(values) for type, values in costs.items()}
    return Measured(min(rates.values()), None, {**{f"{type}_per_s": round(rate) for type, rate in rates.items()}, "rounds": ROUNDS})


@entry("conversions_4k", "1/s", 25000, at_least=True)
def conversions_4k() -> Measured:
    """Explicit conversions of one page a second, with everything the VMM does about them."""
    return _explicit(1, 500, 8500)


@entry("conversions_2m", "1/s", 1000, at_least=True)
def conversions_2m() -> Measured:
    """Explicit conversions of 2 MiB a second, in both directions."""
    return _explicit(LARGE, 20, 420)


@entry("conversions_implicit", "1/s", 30000, at_least=True)
def conversions_implicit() -> Measured:
    """Implicit conversions of one page a second: memory fault, attribute, the instruction again."""
    cost = misses.fault_restart()
    return Measured(1e6 / cost.value, None, cost.detail)
