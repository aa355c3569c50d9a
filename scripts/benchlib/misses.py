"""What a guest pays when the model's engine has to ask: a TLB miss, and an access that contradicts the memory
attributes.

A miss: the guest touches one word in each page of a range that the engine's TLB (256 entries) cannot hold, again and
again. The same code with a stride of 8 bytes has no misses; the difference of the two, by the number of touches, is the
cost of one miss. The value is that of loads in a plain guest, behind four levels of tables with 4 KiB pages. `detail`
has the rest: a page's first miss, stores, private memory of sw-protected, and SEV twice: with as many pages as the
plaintext arena holds (400 of at most 512; every other page, so that they share half of the engine's TLB and all miss),
and with more, where a miss also encrypts one page and decrypts another.

A fault: every page has the attribute PRIVATE and there is no guest_memfd, so that the first touch of a page is
KVM_EXIT_MEMORY_FAULT; the VMM makes the page shared and enters the guest again, which restarts the instruction. It is
`inc qword [page]`, and each page must hold 1 at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from benchlib import loops
from benchlib.bare import DATA, MIB, PAGE, BareGuest, GuestFailed
from benchlib.entry import Measured, entry, interleaved, median, need, seconds

ROUNDS = 5
PAGES, PASSES = 4096, 4
ARENA_PAGES = 400
FAULTS, FAULT_ROUNDS = 1500, 5


@contextmanager
def _miss(
    pages: int, passes: int, *, apart: int = 1, store: bool = False, type: str = "plain", private: bool = False
) -> Iterator[Callable[[], float]]:
    """Gives a call that measures once: microseconds a miss. `apart`: every page, every second one, ..."""
    size = (DATA + pages * apart * PAGE + 2 * MIB - 1) // (2 * MIB) * 2 * MIB

    def code(stride: int) -> bytes:
        return loops.touch(passes, DATA, pages, stride, store=store) + loops.HLT

    with (
        BareGuest(code(apart * PAGE), type=type, size=size, private=private) as wide,
        BareGuest(code(8), type=type, private=private) as narrow,
    ):

        def run(guest: BareGuest) -> float:
            guest.rewind(guest.vcpus[0])
            return seconds(lambda: guest.run_to_halt(guest.vcpus[0]))

        run(wide)
        run(narrow)
        yield lambda: (run(wide) - run(narrow)) / (pages * passes) * 1e6


def _first_miss() -> float:
    """Microseconds a miss of a guest that touches each page for the first time, in memory that is there."""
    size = DATA + PAGES * PAGE // (2 * MIB) * 2 * MIB + 3 * MIB
    code = loops.touch(1, DATA, PAGES, PAGE) + loops.HLT
    with BareGuest(code, size=size) as guest:
        guest.put(DATA, bytes(PAGES * PAGE))
        return seconds(lambda: guest.run_to_halt(guest.vcpus[0])) / PAGES * 1e6


@entry("tlb_fill_us", "us", 3)
def tlb_fill() -> Measured:
    """A TLB miss of a plain guest on the model: walk of four levels of tables, one page entered."""
    need("model")
    kinds: dict[str, dict[str, Any]] = {
        "plain": {"pages": PAGES, "passes": PASSES},
        "plain_store": {"pages": PAGES, "passes": PASSES, "store": True},
        "sw-protected_private": {"pages": PAGES, "passes": PASSES, "type": "sw-protected", "private": True},
        "sev": {"pages": ARENA_PAGES, "passes": 20, "apart": 2, "type": "sev"},
        "sev_beyond_arena": {"pages": 1024, "passes": 2, "type": "sev"},
    }
    with ExitStack() as stack:
        sides = [stack.enter_context(_miss(**options)) for options in kinds.values()]
        costs = dict(zip(kinds, interleaved(ROUNDS, *sides), strict=True))
    costs["plain_first"] = [_first_miss() for _ in range(ROUNDS)]
    medians = {f"{name}_us": round(median(values), 2) for name, values in costs.items()}
    return Measured(median(costs["plain"]), None, {**medians, "pages": PAGES, "rounds": ROUNDS})


def _fault_cycle(guest: BareGuest) -> float:
    """One pass over all pages; microseconds a cycle, the restarted instruction included."""
    from kvmapi.abi import kvm
    from kvmapi.exits import Hlt, MemoryFault

    vm, vcpu = guest.vm, guest.vcpus[0]
    for page in range(FAULTS):
        guest.put(DATA + page * PAGE, bytes(8))
    vm.set_memory_attributes(DATA, FAULTS * PAGE, kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE)
    guest.rewind(vcpu)
    faults = 0
    began = time.perf_counter()
    run = vcpu.host.runner(vcpu.fd)  # as the run loop enters its guests
    exit = vcpu.exit(-run())
    while isinstance(exit, MemoryFault):
        vm.set_memory_attributes(exit.gpa, exit.size, 0)
        faults += 1
        exit = vcpu.exit(-run())
    elapsed = time.perf_counter() - began
    if exit != Hlt() or faults != FAULTS or any(guest.word(DATA + page * PAGE) != 1 for page in range(FAULTS)):
        raise GuestFailed(f"{faults} faults instead of {FAULTS}, or an increment too few or too many; then {exit}")
    return elapsed / FAULTS * 1e6


@entry("fault_restart_us", "us", 30)
def fault_restart() -> Measured:
    """KVM_EXIT_MEMORY_FAULT, KVM_SET_MEMORY_ATTRIBUTES, KVM_RUN, instruction restarted: one cycle on the model."""
    need("model")
    code = loops.count_each(DATA, FAULTS, PAGE) + loops.HLT
    with BareGuest(code, type="sw-protected", size=8 * MIB) as guest:
        _fault_cycle(guest)
        costs = [_fault_cycle(guest) for _ in range(FAULT_ROUNDS)]
    return Measured(median(costs), None, {"best_us": round(min(costs), 2), "faults": FAULTS, "rounds": FAULT_ROUNDS})
