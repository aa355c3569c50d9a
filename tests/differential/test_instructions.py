"""Integer instructions as user programs have them, executed by the model and by a kernel's processor: same registers,
flags and memory after each block, in 64-bit mode and in real mode.

Only flags that the manuals define are compared. A block may fault (a division): then the handler's HLT ends it, and
the frame on the stack is compared with the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from kvmapi.abi import vcpu as v
from kvmapi.kernel import KernelHost
from kvmapi.model.host import ModelHost
from tests.conformance.snippets import CODE, DATA, REAL_CODE, REAL_DATA, STACK, STUBS, LongGuest, RealGuest
from tests.differential.instructions import DATA_SIZE, DF, STATUS, Instruction, Mode, assemble, instructions
from tests.differential.pair import Pair, fields_of, words_of

LONG = Mode(64, CODE, DATA, STACK)
REAL = Mode(16, REAL_CODE, REAL_DATA, REAL_CODE)
STACK_SEEN = 0x100
GPRS = [name for name in v.GENERAL_REGISTERS if name not in ("rip", "rflags", "rsp")]
HALF = 0xFFFFFFFF

values = st.one_of(
    st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 1 << 31, HALF, 1 << 63, (1 << 64) - 1]), st.integers(0, (1 << 64) - 1)
)


class Code(RuleBasedStateMachine):
    """The rules. The two guests stay for all sequences; what a sequence begins with is set anew."""

    guests: dict[int, Pair]

    @initialize(mode=st.sampled_from([LONG, REAL]), contents=st.lists(values, min_size=15, max_size=15), seed=st.integers(0, 255))
    def start(self, mode: Mode, contents: list[int], seed: int) -> None:
        self.mode = mode
        self.pair = self.guests[mode.bits]
        self.pair.log = [f"a guest in {mode.bits}-bit mode, rax... = {', '.join(map(hex, contents))}, data from {seed}"]
        self.pair.settled = ""
        limit = (1 << 64) - 1 if mode.bits == 64 else HALF
        self.now = v.kvm_regs(rip=mode.code, rsp=mode.stack, rflags=2, **{name: value & limit for name, value in zip(GPRS, contents)})
        if mode.bits == 16:
            for name in GPRS[7:]:
                setattr(self.now, name, 0)
        memory = bytes((seed + 37 * n ^ n >> 3) & 0xFF for n in range(DATA_SIZE))
        for side in self.pair.sides:
            side.put(mode.data, memory)
            side.put(mode.stack - STACK_SEEN, bytes(STACK_SEEN))

    @rule(data=st.lists(instructions(LONG), min_size=1, max_size=6))
    @precondition(lambda self: self.mode is LONG)
    def long_block(self, data: list[Instruction]) -> None:
        self.execute(data)

    @rule(data=st.lists(instructions(REAL), min_size=1, max_size=6))
    @precondition(lambda self: self.mode is REAL)
    def real_block(self, data: list[Instruction]) -> None:
        self.execute(data)

    def execute(self, block: list[Instruction]) -> None:
        mode = self.mode
        text, defined = assemble(mode, block)

        def do(side: Any) -> Any:
            side.put(mode.code, text)
            side.vcpu.set_regs(self.now)
            exit = words_of(side.run())
            regs = side.vcpu.get_regs()
            regs.rflags &= ~STATUS | defined
            if mode is LONG and STUBS <= regs.rip < STUBS + 512:
                side.put(regs.rsp + 18, b"\0\0")  # RF of the frame: a processor that QEMU emulates does not push it
            return {
                "exit": exit, **fields_of(regs), "data": side.get(mode.data, DATA_SIZE),
                "stack": side.get(mode.stack - STACK_SEEN, STACK_SEEN),
            }  # fmt: skip

        after = self.pair.see(f"{'; '.join(item.text for item in block)}  [{text.hex()}]", do, what="instructions", fields={"block": block})
        if after is not None:
            self.now = v.kvm_regs(**{name: after[name] for name in v.GENERAL_REGISTERS})
            self.now.rip, self.now.rsp = mode.code, mode.stack
            self.now.rflags = after["rflags"] & (STATUS | DF) | 2


@pytest.mark.kvm
def test_instructions(drive: Callable[..., None]) -> None:
    with (
        Pair(KernelHost(), ModelHost(), lambda host: LongGuest(host, b"")) as long,
        Pair(KernelHost(), ModelHost(), lambda host: RealGuest(host, b"")) as real,
    ):
        drive(Code, 150, 12, guests={64: long, 16: real})
