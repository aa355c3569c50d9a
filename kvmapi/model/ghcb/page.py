"""The GHCB as a page of guest memory: reading a request once, checking that it is complete, writing the answer.

A field counts only if its bit in `valid_bitmap` is set; another reads as 0. The exit code and both exit informations are
read in any case, and checked for their bits afterwards. Taking a request clears the bitmap, so that what is valid when
the guest goes on is what was answered.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from kvmapi.abi import ghcb as abi
from kvmapi.abi.ghcb import ghcb, ghcb_save_area

_QWORD, _USAGE = struct.Struct("<Q"), struct.Struct("<I")
_THREE = struct.Struct("<3Q")  # RCX, RDX, RBX
_EXIT = struct.Struct("<4Q")  # sw_exit_code, sw_exit_info_1, sw_exit_info_2, sw_scratch
_INFO = struct.Struct("<2Q")
_XCR0_LEAF = 0xD  # of CPUID


def _at(name: str) -> int:
    return int(getattr(ghcb_save_area, name).offset)


def _bit(name: str) -> int:
    return 1 << _at(name) // 8


_BITMAP_AT, _BITMAP_END, _USAGE_AT = _at("valid_bitmap"), _at("valid_bitmap") + 16, ghcb.ghcb_usage.offset
SHARED_BUFFER_AT = ghcb.shared_buffer.offset
SHARED_BUFFER_END = ghcb.reserved_0xff0.offset
_RAX_AT, _RCX_AT, _RSI_AT, _CPL_AT, _XCR0_AT, _EXIT_AT, _INFO_AT = (
    _at(name) for name in ("rax", "rcx", "rsi", "cpl", "xcr0", "sw_exit_code", "sw_exit_info_1")
)
_ANSWERED = _bit("sw_exit_info_1") | _bit("sw_exit_info_2")
_ALWAYS = _bit("sw_exit_code") | _ANSWERED
_GIVEN = sum(_bit(name) for name in ("rax", "rbx", "rcx", "rdx"))
_RAX, _RBX, _RCX, _RDX, _RSI, _CPL = (_bit(name) for name in ("rax", "rbx", "rcx", "rdx", "rsi", "cpl"))
_SCRATCH, _XCR0 = _bit("sw_scratch"), _bit("xcr0")
_NEEDED = {  # exit code -> bits
    abi.SVM_EXIT_WRITE_DR7: _RAX,
    abi.SVM_EXIT_RDPMC: _RCX,
    abi.SVM_EXIT_VMMCALL: _RAX | _CPL,
    abi.SVM_EXIT_MONITOR: _RAX | _RCX | _RDX,
    abi.SVM_EXIT_MWAIT: _RAX | _RCX,
    abi.SVM_VMGEXIT_MMIO_READ: _SCRATCH,
    abi.SVM_VMGEXIT_MMIO_WRITE: _SCRATCH,
}


class Request(NamedTuple):
    """What the guest asks for. Registers that it did not mark as valid are 0; XCR0 is None then."""

    valid: int  # the bitmap
    code: int
    info_1: int
    info_2: int
    scratch: int  # GPA of the buffer
    rax: int
    rbx: int
    rcx: int
    rdx: int
    rsi: int
    cpl: int
    xcr0: int | None
    usage: int

    def complete(self) -> bool:
        """Is everything there that this request needs?"""
        needed = _ALWAYS | _NEEDED.get(self.code, 0)
        if self.code == abi.SVM_EXIT_CPUID:
            needed |= _RAX | _RCX | (_XCR0 if self.rax == _XCR0_LEAF else 0)
        elif self.code == abi.SVM_EXIT_IOIO:
            if self.info_1 & abi.SVM_IOIO_STR_MASK:
                needed |= _SCRATCH
            elif not self.info_1 & abi.SVM_IOIO_TYPE_MASK:
                needed |= _RAX
        elif self.code == abi.SVM_EXIT_MSR:
            needed |= _RCX | (_RAX | _RDX if self.info_1 else 0)
        return self.valid & needed == needed


def take(page: memoryview) -> Request:
    """The request in a GHCB; nothing in it is valid any more afterwards."""
    save = bytes(page[:0x400])  # the guest's other vCPUs may be writing to it
    valid = int.from_bytes(save[_BITMAP_AT:_BITMAP_END], "little")
    page[_BITMAP_AT:_BITMAP_END] = bytes(16)
    code, info_1, info_2, scratch = _EXIT.unpack_from(save, _EXIT_AT)
    rcx, rdx, rbx = _THREE.unpack_from(save, _RCX_AT)
    return Request(
        valid,
        code,
        info_1,
        info_2,
        scratch if valid & _SCRATCH else 0,
        _QWORD.unpack_from(save, _RAX_AT)[0] if valid & _RAX else 0,
        rbx if valid & _RBX else 0,
        rcx if valid & _RCX else 0,
        rdx if valid & _RDX else 0,
        _QWORD.unpack_from(save, _RSI_AT)[0] if valid & _RSI else 0,
        save[_CPL_AT] if valid & _CPL else 0,
        _QWORD.unpack_from(save, _XCR0_AT)[0] if valid & _XCR0 else None,
        _USAGE.unpack_from(page, _USAGE_AT)[0],
    )


def _validate(page: memoryview, bits: int) -> None:
    valid = int.from_bytes(page[_BITMAP_AT:_BITMAP_END], "little") | bits
    page[_BITMAP_AT:_BITMAP_END] = valid.to_bytes(16, "little")


def respond(page: memoryview, info_1: int, info_2: int) -> None:
    """The answer: a GHCB_HV_RESP_* number and what belongs to it."""
    _INFO.pack_into(page, _INFO_AT, info_1, info_2)
    _validate(page, _ANSWERED)


def give(page: memoryview, rax: int, rbx: int, rcx: int, rdx: int) -> None:
    """KVM's RAX, RBX, RCX and RDX, all four whatever the request was: the guest must know which of them mean anything."""
    _QWORD.pack_into(page, _RAX_AT, rax)
    _THREE.pack_into(page, _RCX_AT, rcx, rdx, rbx)
    _validate(page, _GIVEN)
