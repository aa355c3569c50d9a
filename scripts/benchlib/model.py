"""Round trips on the software model, for each VM type.

The target for OUT is that of a guest without encryption. A SEV guest pays for secrecy at every exit: two mprotect
calls that make the plaintext arena inaccessible and accessible again, and a comparison of each cached page's
ciphertext with what was left there. `detail` shows that cost; it has no target. MAP_GPA_RANGE is for guests with
private memory: the value is that of the slower of these types.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from benchlib import tiny
from benchlib.entry import Measured, entry, interleaved, median, need
from benchlib.trips import round_trip

ROUNDS = 5
TYPES = ("plain", "sw-protected", "sev")


def _model(code: Callable[[int], bytes], few: int, many: int, exit_name: str, judged: tuple[str, ...]) -> Measured:
    need("model")
    with ExitStack() as stack:
        sides = [stack.enter_context(round_trip(code, few, many, type=type, on="model", exit_name=exit_name)) for type in TYPES]
        costs = dict(zip(TYPES, interleaved(ROUNDS, *sides), strict=True))
    medians = {f"{type}_us": round(median(values), 2) for type, values in costs.items()}
    return Measured(max(median(costs[type]) for type in judged), None, {**medians, "rounds": ROUNDS, "trips": many - few})


@entry("model_out_us", "us", 6)
def model_out() -> Measured:
    """OUT of one byte on the model, round trip of a guest without encryption."""
    return _model(tiny.out_loop, 1000, 21000, "IO", ("plain", "sw-protected"))


@entry("model_map_gpa_us", "us", 40)
def model_map_gpa() -> Measured:
    """MAP_GPA_RANGE of one page on the model (the slower of sev and sw-protected), round trip with the whole
    conversion.
    """
    return _model(tiny.map_loop, 500, 8500, "HYPERCALL", ("sev", "sw-protected"))
