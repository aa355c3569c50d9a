"""How fast the model executes instructions: the same loop on the model, in the bare engine and in QEMU's TCG, in turn.

Every value is a speed relative to a yardstick (1 = as fast, more is better): the median of the rounds' ratios, since
within a round other load on the machine hits all sides alike. A loop is measured once, whichever of its entries are
asked for.

The yardsticks are what they are best at: TCG starts with its own firmware and no kernel (tcg.py), the bare engine runs
with one call (unicorn_bare.py), and the model runs a plain guest with 4 KiB pages (bare.py), from KVM_RUN to
KVM_EXIT_HLT.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from benchlib import loops, tcg, unicorn_bare
from benchlib.bare import DATA, BareGuest, GuestFailed
from benchlib.entry import Measured, Skipped, entry, interleaved, median, need, seconds

ROUNDS = 11
ALU_ROUNDS = 30_000_000
MEMORY_PASSES = 1500
VS_TCG, VS_ENGINE = 0.5, 0.8


@dataclass(frozen=True)
class Loop:
    """A loop at any address of its data, how many instructions it executes, and RAX at its end (None: not looked at)."""

    code: Callable[[int], bytes]
    instructions: int
    rax: int | None = None


ALU = Loop(lambda data: loops.alu(ALU_ROUNDS), ALU_ROUNDS * loops.ALU_INSTRUCTIONS, loops.alu_result(ALU_ROUNDS))
MEMORY = Loop(lambda data: loops.memory(MEMORY_PASSES, data), MEMORY_PASSES * loops.MEMORY_WORDS * loops.MEMORY_INSTRUCTIONS)

_measured: dict[Loop, dict[str, list[float]]] = {}


def _model(guest: BareGuest, loop: Loop) -> float:
    vcpu = guest.vcpus[0]
    guest.rewind(vcpu)
    elapsed = seconds(lambda: _halt(guest))
    found = vcpu.get_regs()
    if loop.rax not in (None, found.rax):
        raise GuestFailed(f"RAX is {found.rax:#x} at the end of the loop, not {loop.rax:#x}")
    return elapsed


def _halt(guest: BareGuest) -> None:
    from kvmapi.exits import Hlt

    vcpu = guest.vcpus[0]
    exit = vcpu.exit(vcpu.run())
    if exit != Hlt():
        raise GuestFailed(f"{exit} instead of HLT")


def _sides(loop: Loop) -> dict[str, list[float]]:
    """Seconds of each side, round by round: model, engine, and tcg where it is installed."""
    if loop in _measured:
        return _measured[loop]
    need("model")
    with ExitStack() as stack:
        guest = stack.enter_context(BareGuest(loop.code(DATA) + loops.HLT))
        engine = unicorn_bare.Engine(loop.code(unicorn_bare.DATA))
        sides = {"model": lambda: _model(guest, loop), "engine": engine.seconds}
        try:
            sides["tcg"] = stack.enter_context(tcg.Tcg(loop.code(tcg.DATA))).seconds
        except Skipped:
            pass  # its entry says so
        interleaved(1, *sides.values())  # translates, faults memory in
        _measured[loop] = dict(zip(sides, interleaved(ROUNDS, *sides.values()), strict=True))
    return _measured[loop]


def _against(loop: Loop, yardstick: str) -> Measured:
    found = _sides(loop)
    mips = {f"{side}_mips": round(loop.instructions / median(times) / 1e6) for side, times in found.items()}
    ratio = median([their / our for our, their in zip(found["model"], found[yardstick], strict=True)])
    return Measured(ratio, None, {**mips, "instructions": loop.instructions, "rounds": ROUNDS})


@entry("alu_vs_tcg", "speed", VS_TCG, at_least=True)
def alu_vs_tcg() -> Measured:
    """Arithmetic in a loop of 4 instructions: speed of the model relative to qemu-system-x86_64 -accel tcg."""
    tcg.need_qemu()
    return _against(ALU, "tcg")


@entry("alu_vs_engine", "speed", VS_ENGINE, at_least=True)
def alu_vs_engine() -> Measured:
    """The same relative to the bare engine (Unicorn, virtual TLB, one uc_emu_start)."""
    return _against(ALU, "engine")


@entry("memory_vs_tcg", "speed", VS_TCG, at_least=True)
def memory_vs_tcg() -> Measured:
    """A load and a store a round over 64 KiB, relative to qemu-system-x86_64 -accel tcg."""
    tcg.need_qemu()
    return _against(MEMORY, "tcg")


@entry("memory_vs_engine", "speed", VS_ENGINE, at_least=True)
def memory_vs_engine() -> Measured:
    """The same relative to the bare engine."""
    return _against(MEMORY, "engine")
