"""x87 and SSE state: the engine's registers as an FXSAVE image, and from there as KVM's structs.

The FXSAVE image (512 bytes) is the one form everything else is made of: struct kvm_fpu reorders it, the XSAVE image
begins with it. The model's CPU has no state beyond it, so an XSAVE image is the FXSAVE image, a header that says "x87
and SSE", and zeroes. Source: AMD64 Architecture Programmer's Manual volume 2, 11.5 (FXSAVE) and 11.5.x (XSAVE area).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmapi.model.cpu.cpu import Cpu

FXSAVE_SIZE, XSAVE_SIZE, FPU_SIZE = 512, 4096, 416
X87, SSE = 1, 2
SUPPORTED = X87 | SSE  # XCR0
MXCSR_MASK = 0xFFFF
_HEAD = struct.Struct("<HHBxHQQII")  # fcw fsw ftw fop rip rdp mxcsr mxcsr_mask
_KVM_HEAD = struct.Struct("<HHBxHQQ")  # fcw fsw ftwx last_opcode last_ip last_dp
_XMM_STRIDE = 64
_INIT = (0x037F, 0x1F80)
_X87_HEAD = struct.pack("<HHBxHQQ", _INIT[0], 0, 0, 0, 0, 0)


class BadState(Exception):
    """The image has bits that the CPU refuses."""


def _names() -> tuple[int, int]:
    from unicorn import x86_const

    return x86_const.UC_X86_REG_FPCW, x86_const.UC_X86_REG_MXCSR


def reset(cpu: Cpu) -> None:
    """The state after RESET: FNINIT's control word, MXCSR 0x1f80, registers zero, XCR0 1."""
    image = bytearray(FXSAVE_SIZE)
    _HEAD.pack_into(image, 0, _INIT[0], 0, 0, 0, 0, 0, _INIT[1], MXCSR_MASK)
    restore(cpu, bytes(image))
    struct.pack_into("<Q", cpu.native.state, cpu.where.xcr0, X87)


def save(cpu: Cpu) -> bytes:
    """FXSAVE, 64-bit form."""
    blob, where = cpu.native.state, cpu.where
    top, fpus, fpuc = struct.unpack_from("<IHH", blob, where.fpuc - 6)
    tags = bytes(blob[where.fpuc + 2 : where.fpuc + 10])
    fop, rip, rdp = struct.unpack_from("<H6xQQ", blob, where.fpregs + 128)
    image = bytearray(FXSAVE_SIZE)
    valid = sum(1 << number for number, empty in enumerate(tags) if not empty)
    mxcsr = struct.unpack_from("<I", blob, where.mxcsr)[0]
    _HEAD.pack_into(image, 0, fpuc, fpus & ~0x3800 | (top & 7) << 11, valid, fop, rip, rdp, mxcsr, MXCSR_MASK)
    for number in range(8):
        at = where.fpregs + 16 * ((top + number) & 7)
        image[32 + 16 * number : 42 + 16 * number] = blob[at : at + 10]
    for number in range(16):
        at = where.xmm + _XMM_STRIDE * number
        image[160 + 16 * number : 176 + 16 * number] = blob[at : at + 16]
    return bytes(image)


def restore(cpu: Cpu, image: bytes) -> None:
    """FXRSTOR, 64-bit form. Raises BadState for reserved MXCSR bits, with nothing changed."""
    fcw, fsw, valid, fop, rip, rdp, mxcsr, _ = _HEAD.unpack_from(image)
    if mxcsr & ~MXCSR_MASK:
        raise BadState(f"mxcsr {mxcsr:#x} has reserved bits")
    blob, where = cpu.native.state, cpu.where
    top = fsw >> 11 & 7
    struct.pack_into("<IH", blob, where.fpuc - 6, top, fsw & ~0x3800)
    blob[where.fpuc + 2 : where.fpuc + 10] = bytes(0 if valid >> number & 1 else 1 for number in range(8))
    struct.pack_into("<H6xQQ", blob, where.fpregs + 128, fop, rip, rdp)
    for number in range(8):
        at = where.fpregs + 16 * ((top + number) & 7)
        blob[at : at + 10] = image[32 + 16 * number : 42 + 16 * number]
    for number in range(16):
        at = where.xmm + _XMM_STRIDE * number
        blob[at : at + 16] = image[160 + 16 * number : 176 + 16 * number]
    # The engine derives rounding modes from the control words: these go through its own calls.
    fpcw_name, mxcsr_name = _names()
    cpu.native.write_register(fpcw_name, fcw)
    cpu.native.write_register(mxcsr_name, mxcsr)


# ---- KVM's forms
def to_kvm_fpu(image: bytes) -> bytes:
    """struct kvm_fpu from an FXSAVE image. KVM leaves its mxcsr field zero."""
    return image[32:160] + _KVM_HEAD.pack(*_HEAD.unpack_from(image)[:6]) + image[160:416] + bytes(8)


def from_kvm_fpu(data: bytes, before: bytes) -> bytes:
    """An FXSAVE image from struct kvm_fpu. KVM does not read its mxcsr field: that of `before` stays."""
    image = bytearray(before)
    _HEAD.pack_into(image, 0, *_KVM_HEAD.unpack_from(data, 128), *_HEAD.unpack_from(before)[6:])
    image[32:160] = data[:128]
    image[160:416] = data[128 + _KVM_HEAD.size : 128 + _KVM_HEAD.size + 256]
    return bytes(image)


def to_xsave(image: bytes) -> bytes:
    """struct kvm_xsave: standard format, both components present."""
    return image + struct.pack("<Q", SUPPORTED) + bytes(XSAVE_SIZE - FXSAVE_SIZE - 8)


def from_xsave(data: bytes) -> bytes:
    """The FXSAVE image in a struct kvm_xsave; absent components are in their initial state. Raises BadState for
    components the CPU does not have, and for compacted format.
    """
    components, compacted = struct.unpack_from("<QQ", data, FXSAVE_SIZE)
    if components & ~SUPPORTED or compacted or any(data[FXSAVE_SIZE + 16 : FXSAVE_SIZE + 64]):
        raise BadState(f"xstate_bv {components:#x}, xcomp_bv {compacted:#x}, or reserved bytes of the header")
    return initialise(data[:FXSAVE_SIZE], components)


def present(data: bytes) -> int:
    """The components that an XSAVE image has."""
    return int.from_bytes(data[FXSAVE_SIZE : FXSAVE_SIZE + 8], "little")


def initialise(image: bytes, components: int) -> bytes:
    """The FXSAVE image with all but these components in their initial state."""
    changed = bytearray(image)
    if not components & X87:
        changed[:24] = _X87_HEAD
        changed[32:160] = bytes(128)
    if not components & SSE:
        changed[160:416] = bytes(256)
    return bytes(changed)


def in_use(image: bytes) -> int:
    """The components that are not in their initial state, as XSAVE tells them."""
    x87 = image[:24] != _X87_HEAD or any(image[32:160])
    return (X87 if x87 else 0) | (SSE if any(image[160:416]) else 0)
