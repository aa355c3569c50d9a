"""The CPU's registers by name: what KVM_GET/SET_REGS and KVM_GET/SET_SREGS read and write.

The engine's CPU structure (layout.py) is the only copy, and `Registers` a view of it: what is written is what the guest
goes on with. RFLAGS is special: while the guest runs, the condition codes are computed lazily and only the engine can
tell them.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from kvmapi.model.cpu import layout
from kvmapi.model.cpu.layout import SEG_SIZE, SEGS, Layout
from kvmapi.model.cpu.native import Native

ES, CS, SS, DS, FS, GS, LDT, TR, GDT, IDT = range(10)
RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)  # general registers, by the encoder's number
_SEGMENT = struct.Struct("<IIQII")
F_TYPE_SHIFT, F_S, F_DPL_SHIFT, F_P, F_AVL, F_L, F_DB, F_G = 8, 1 << 12, 13, 1 << 15, 1 << 20, 1 << 21, 1 << 22, 1 << 23
CR0_PE, CR0_MP, CR0_EM, CR0_TS = 1, 2, 4, 8
CR4_OSFXSR, CR4_SMAP = 1 << 9, 1 << 21
EFER_LMA = 1 << 10
RFLAGS_VM, RFLAGS_AC = 1 << 17, 1 << 18
MAX_PHYS_BITS = 48
_RIP, _HFLAGS, _CS_BASE = layout.EIP >> 3, layout.HFLAGS >> 2, (SEGS + CS * SEG_SIZE >> 3) + 1  # indices for the hot path
_CS64, _CS32, _NARROW = layout.HF_CS64, layout.HF_CS32, 1  # _NARROW: not 64 bits wide


class Segment(NamedTuple):
    """One segment register with its hidden part. `flags` holds the descriptor's access rights in bits 8-23."""

    selector: int
    base: int
    limit: int
    flags: int


class Registers:
    """Named access to one engine's CPU structure."""

    def __init__(self, native: Native, where: Layout) -> None:
        self.native = native
        self._where = where
        self.u64 = native.state[: len(native.state) & -8].cast("Q")
        self.u32 = native.state[: len(native.state) & -4].cast("I")
        self._efer = where.efer >> 3

    # ---- general registers, by the encoder's number (0 rax, 1 rcx, 2 rdx, 3 rbx, 4 rsp, 5 rbp, 6 rsi, 7 rdi, 8..15)
    def gpr(self, number: int) -> int:
        return self.u64[(layout.REGS >> 3) + number]

    def set_gpr(self, number: int, value: int) -> None:
        self.u64[(layout.REGS >> 3) + number] = value

    @property
    def rip(self) -> int:
        return self.u64[layout.EIP >> 3]

    @rip.setter
    def rip(self, value: int) -> None:
        self.u64[layout.EIP >> 3] = value

    def set_flags(self, value: int) -> None:
        """RFLAGS as a whole: in EFLAGS, which the engine takes at its next start, and where it keeps them while it
        runs.
        """
        self.u64[layout.EFLAGS >> 3] = value | 2
        self.u64[layout.CC_SRC >> 3] = value & layout.CC_FLAGS
        self.u32[layout.CC_OP >> 2] = 1
        self.u32[layout.DF >> 2] = 0xFFFFFFFF if value & 0x400 else 1

    # ---- control registers
    def cr(self, number: int) -> int:
        return self.u64[(layout.CR >> 3) + number]

    def set_cr(self, number: int, value: int) -> None:
        self.u64[(layout.CR >> 3) + number] = value

    @property
    def efer(self) -> int:
        return self.u64[self._efer]

    @efer.setter
    def efer(self, value: int) -> None:
        self.u64[self._efer] = value

    # ---- segments
    def segment(self, number: int) -> Segment:
        selector, _, base, limit, flags = _SEGMENT.unpack_from(self.native.state, SEGS + number * SEG_SIZE)
        return Segment(selector & 0xFFFF, base, limit, flags)

    def set_segment(self, number: int, segment: Segment) -> None:
        _SEGMENT.pack_into(self.native.state, SEGS + number * SEG_SIZE, segment.selector, 0, segment.base, segment.limit, segment.flags)

    @property
    def cpl(self) -> int:
        return self.u32[layout.HFLAGS >> 2] & layout.HF_CPL

    @property
    def long_mode(self) -> bool:
        """Is 64-bit code running (LMA and CS.L)?"""
        return self.u32[layout.HFLAGS >> 2] & layout.HF_CS64 != 0

    @property
    def code_bits(self) -> int:
        """Default operand size of the code that runs: 16, 32 or 64."""
        hflags = self.u32[layout.HFLAGS >> 2]
        return 64 if hflags & layout.HF_CS64 else 32 if hflags & layout.HF_CS32 else 16

    @property
    def linear_rip(self) -> int:
        """RIP as a linear address: with the code segment's base outside 64-bit mode."""
        if self.u32[_HFLAGS] & _CS64:
            return self.u64[_RIP]
        return self.u64[_CS_BASE] + self.u64[_RIP] & 0xFFFFFFFF

    def place(self) -> int:
        """The linear RIP and, above its 64 bits, what code runs: a number for each place in code of each width."""
        modes = self.u32[_HFLAGS]
        if modes & _CS64:
            return self.u64[_RIP]
        return (self.u64[_CS_BASE] + self.u64[_RIP] & 0xFFFFFFFF) | (modes & _CS32 | _NARROW) << 64

    def settle(self) -> None:
        """Derive the mode flags from CR0, CR4, EFER and the code and stack segments, after any of them was written."""
        cr0, cr4 = self.cr(0), self.cr(4)
        code, stack = self.segment(CS), self.segment(SS)
        flags = self.u32[layout.HFLAGS >> 2] & layout.HF_KEEP
        protected = cr0 & CR0_PE
        virtual_8086 = bool(self.u64[layout.EFLAGS >> 3] & RFLAGS_VM) and not self.efer & EFER_LMA
        if protected:
            flags |= layout.HF_PE | (3 if virtual_8086 else stack.flags >> F_DPL_SHIFT & 3)
        for bit, flag in ((CR0_MP, layout.HF_MP), (CR0_EM, layout.HF_EM), (CR0_TS, layout.HF_TS)):
            flags |= flag if cr0 & bit else 0
        flags |= layout.HF_OSFXSR if cr4 & CR4_OSFXSR else 0
        flags |= layout.HF_SMAP if cr4 & CR4_SMAP else 0
        long = bool(self.efer & EFER_LMA)
        flags |= layout.HF_LMA if long else 0
        if long and code.flags & F_L:
            flags |= layout.HF_CS32 | layout.HF_SS32 | layout.HF_CS64
        else:
            flags |= layout.HF_CS32 if code.flags & F_DB else 0
            flags |= layout.HF_SS32 if stack.flags & F_DB else 0
            data_bases = self.segment(DS).base | self.segment(ES).base | stack.base
            if not protected or virtual_8086 or not flags & layout.HF_CS32 or data_bases:
                flags |= layout.HF_ADDSEG
        self.u32[layout.HFLAGS >> 2] = flags

    def forget_exception(self) -> int:
        """The error code the engine stored with its last exception; its memory of that exception is cleared (it would
        turn the next into #DF).
        """
        error = self.u32[self._where.error_code >> 2]
        self.u32[self._where.old_exception >> 2] = 0xFFFFFFFF
        return error
