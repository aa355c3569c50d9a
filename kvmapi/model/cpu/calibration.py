"""Find and check the places Unicorn keeps CPU state in (see layout.py for why). Runs once per process, about 4 ms.

1. Marker values go in through Unicorn's register calls and must appear at the offsets the model uses.
2. A #DE and a #GP(0x70) in two fresh engines leave old_exception and error_code behind: the one pair of places that
   fits both and a fresh engine.
3. Two loads from unmistakable addresses, refused by the TLB hook, leave the full faulting address in the engine's
   structure (the hook itself is told the page only).
4. A stop request that comes late, and one that does not, show that a flag found in the engine's code is the right one.
"""

from __future__ import annotations

import ctypes
import os
import struct

from unicorn import unicorn_const as uc
from unicorn import x86_const as x86

from kvmapi.model.cpu import layout, stubs
from kvmapi.model.cpu.layout import Layout, expect, find_all
from kvmapi.model.cpu.native import Native, TlbEntry, TlbFill, own_memory

_CODE_AT = 0x1000
_HLT = b"\xf4"
_DIVIDE_BY_ZERO = b"\x31\xc9\xf7\xf1" + _HLT  # xor ecx, ecx; div ecx
_TWO_INCREMENTS = b"\xff\xc1\xff\xc1" + _HLT  # inc ecx; inc ecx
_LOAD_BAD_SELECTOR = b"\x66\xb8\x70\x00\x8e\xd8" + _HLT  # mov ax, 0x70; mov ds, ax -> #GP(0x70)
_MARKS = {
    x86.UC_X86_REG_RAX: (layout.REGS, 0x1122334455667788),
    x86.UC_X86_REG_R15: (layout.REGS + 8 * 15, 0x99AABBCCDDEEFF01),
    x86.UC_X86_REG_RIP: (layout.EIP, 0x0000FEEDFACECAFE),
    x86.UC_X86_REG_FS_BASE: (layout.SEGS + 4 * layout.SEG_SIZE + 8, 0x7777777711111111),
    x86.UC_X86_REG_GS_BASE: (layout.SEGS + 5 * layout.SEG_SIZE + 8, 0x6666666622222222),
    x86.UC_X86_REG_CR2: (layout.CR + 16, 0x5555444433332221),
}
_TSC_AUX = 0xC0000103


class _Probe:
    """A throw-away engine with one page of code at 0x1000."""

    def __init__(self, code: bytes) -> None:
        self.native = Native()
        self._ram = ctypes.create_string_buffer(8192)
        page = (ctypes.addressof(self._ram) + 4095) & ~4095
        ctypes.memmove(page, code, len(code))
        self.native.map(_CODE_AT, 4096, page)
        self.native.hook_interrupts(lambda _uc, _number, _data: self.native.stop())
        self.native.hook_tlb_fill(TlbFill(self._fill))

    @staticmethod
    def _fill(_uc: int, va: int, _kind: int, entry: int, _data: int) -> bool:
        if va != _CODE_AT:
            return False
        slot = TlbEntry.from_address(entry)
        slot.paddr, slot.perms = _CODE_AT, uc.UC_PROT_ALL
        return True

    def run(self) -> bytes:
        self.native.start(_CODE_AT)
        return bytes(self.native.state)

    def structure(self) -> bytes:
        """The first page of the engine's own structure, read so that a smaller allocation is no crash."""
        return os.pread(own_memory(os.getpid()), 4096, self.native.handle)


def run() -> Layout:
    """All four steps; raises EngineMismatch."""
    native = Native()
    for register, (_, value) in _MARKS.items():
        native.write_register(register, value)
    native.write_register(x86.UC_X86_REG_FPCW, 0x027F)
    native.write_register(x86.UC_X86_REG_MXCSR, 0x1FA1)
    native.write_wide(x86.UC_X86_REG_XMM0, b"sixteen  markers")
    native.write_msr(0xC0000080, 0x0D01)
    native.write_wide(x86.UC_X86_REG_FP0, b"ten  marks")
    native.write_msr(_TSC_AUX, 0x13572468)
    native.write_register(x86.UC_X86_REG_DR7, 0x2AAAAAAA00000400)
    blob = bytes(native.state)
    for offset, value in _MARKS.values():
        expect(blob[offset : offset + 8] == struct.pack("<Q", value), "its registers")
    hflags = struct.unpack_from("<I", blob, layout.HFLAGS)[0]
    expect(hflags & (layout.HF_CS64 | layout.HF_LMA | layout.HF_PE) == layout.HF_CS64 | layout.HF_LMA | layout.HF_PE, "its mode flags")
    efer = [at for at in find_all(blob, struct.pack("<Q", 0x0D01)) if layout.CR < at < layout.CR + 400]
    fpuc = [at for at in find_all(blob, struct.pack("<H", 0x027F)) if efer and efer[0] < at < efer[0] + 64]
    mxcsr = find_all(blob, struct.pack("<I", 0x1FA1))
    xmm = find_all(blob, b"sixteen  markers")
    fpregs = find_all(blob, b"ten  marks")
    tsc_aux = find_all(blob, struct.pack("<Q", 0x13572468))
    dr7 = find_all(blob, struct.pack("<Q", 0x2AAAAAAA00000400))
    expect(all(len(found) == 1 for found in (efer, fpuc, mxcsr, xmm, fpregs)), "EFER and its x87 and SSE state")
    expect(len(tsc_aux) == 1 and blob[tsc_aux[0] + 8 : tsc_aux[0] + 16] == struct.pack("<Q", 3), "XCR0")  # x87 and SSE
    expect(len(dr7) == 1, "the debug registers")
    error_code, old_exception = _exception_fields()
    return Layout(
        efer=efer[0],
        error_code=error_code,
        old_exception=old_exception,
        fpuc=fpuc[0],
        mxcsr=mxcsr[0],
        xmm=xmm[0],
        invalid_addr=_fault_address_field(),
        fpregs=fpregs[0],
        xcr0=tsc_aux[0] + 8,
        debug=dr7[0] - 56,
        quiet=_quiet_field(),
    )


def _quiet_field() -> int:
    """The flag does what it is thought to do: with it a bare stop request comes too late, and a stop stub does not."""
    offset = stubs.quiet_offset()
    for late in (True, False):
        probe = _Probe(_TWO_INCREMENTS)
        probe.native.quieten(offset)
        if late:
            probe.native.hook_code(_CODE_AT + 2, stubs.exported("uc_emu_stop"))
        else:
            probe.native.hook_stop_at(_CODE_AT + 2)
        ecx = struct.unpack_from("<Q", probe.run(), layout.REGS + 8)[0]
        expect(ecx == 1 + late, "its flag for stop requests")
    return offset


def _exception_fields() -> tuple[int, int]:
    blobs = [_Probe(code).run() for code in (_HLT, _DIVIDE_BY_ZERO, _LOAD_BAD_SELECTOR)]

    def where(*wanted: int) -> list[int]:
        return [at for at in range(0, len(blobs[0]) - 3, 4) if tuple(struct.unpack_from("<i", blob, at)[0] for blob in blobs) == wanted]

    old = where(-1, 0, 13)
    expect(len(old) == 1, "the exception in flight")
    error = [at for at in where(0, 0, 0x70) if old[0] - 200 < at < old[0]]
    expect(len(error) == 1, "the error code")
    return error[0], old[0]


def _fault_address_field() -> int:
    candidates: set[int] | None = None
    for address in (0x123456789ABC, 0x0FEDCBA98765):
        probe = _Probe(b"\x48\xa1" + struct.pack("<Q", address) + _HLT)  # mov rax, [address]
        probe.run()
        here = set(find_all(probe.structure(), struct.pack("<Q", address)))
        candidates = here if candidates is None else candidates & here
    expect(candidates is not None and len(candidates) == 1, "the faulting address")
    return next(iter(candidates or {0}))
