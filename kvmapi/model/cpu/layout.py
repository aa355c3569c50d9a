"""Where Unicorn keeps the CPU's state: the emulator's CPU structure, read and written in place.

Unicorn's register calls reach only part of an x86 CPU: writing CS changes the selector and leaves the hidden
descriptor, the CPL and the mode flags as they were. Its `uc_context_save`, on the other hand, is a plain copy of the
emulator's CPU structure, which says how large that is and what it holds; native.py finds where the original stands.
So the model edits fields there, at known offsets: GPRs, RIP, segments with their hidden parts, mode flags and control
registers.

The offsets follow the member order of QEMU 5.0's CPUX86State, which unicorn 2.1.4 embeds. They are not believed but
*checked*: `calibrate()` writes unmistakable values through Unicorn's own register calls and looks for them in the
structure, provokes a #DE and a #GP to find the two fields that no call reaches, and refuses a page to find where
Unicorn keeps the faulting address. A build whose layout differs is refused with a sentence instead of computing
nonsense.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

REGS = 0  # u64[16]: rax rcx rdx rbx rsp rbp rsi rdi r8..r15 (the encoder's order)
EIP = 128
EFLAGS = 136  # without CC flags and DF while the guest runs; see the engine
CC_SRC = 152
CC_OP = 168  # 1 = CC_OP_EFLAGS: cc_src holds the flags as they are
DF = 172  # 1 = up, -1 = down
HFLAGS = 176
SEGS = 184  # 24 bytes each: selector u32, pad, base u64, limit u32, flags u32; order ES CS SS DS FS GS LDT TR GDT IDT
SEG_SIZE = 24
CR = 424  # u64[9]
CC_FLAGS = 0x8D5  # O S Z A P C


# hflags: what the translator must know besides the flags register
HF_CS32, HF_SS32, HF_ADDSEG, HF_PE, HF_MP, HF_EM, HF_TS = 1 << 4, 1 << 5, 1 << 6, 1 << 7, 1 << 9, 1 << 10, 1 << 11
HF_LMA, HF_CS64, HF_OSFXSR, HF_SMAP = 1 << 14, 1 << 15, 1 << 22, 1 << 23
HF_CPL = 3
HF_KEEP = 1 << 3  # interrupt shadow belongs to the instruction stream, not to the descriptors


class EngineMismatch(Exception):
    """The installed Unicorn does not have the layout this model was written for."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Offsets found by calibration: bytes into the CPU structure, but `invalid_addr` and `quiet`, which are bytes into
    the engine's own structure.
    """

    efer: int
    error_code: int
    old_exception: int
    fpuc: int
    mxcsr: int
    xmm: int
    invalid_addr: int
    fpregs: int
    xcr0: int
    debug: int
    quiet: int


def find_all(blob: bytes, value: bytes) -> list[int]:
    """Every offset at which `value` stands in `blob`."""
    found, at = [], blob.find(value)
    while at >= 0:
        found.append(at)
        at = blob.find(value, at + 1)
    return found


@functools.cache
def calibrate() -> Layout:
    """Check the fixed offsets and find the others. Raises EngineMismatch. Cached; about 4 ms once per process."""
    from kvmapi.model.cpu import calibration

    return calibration.run()


def expect(condition: bool, what: str) -> None:
    """Refuse the engine with a sentence unless `condition` holds."""
    if not condition:
        raise EngineMismatch(
            f"the installed unicorn keeps {what} elsewhere than version 2.1.4 does: install it with `pip install unicorn==2.1.4`"
        )
