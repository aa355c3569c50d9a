"""x87 and SSE state: KVM_GET_FPU and SET_FPU, XSAVE, XCRS; the guest works with what was set, and we see what it left."""

from __future__ import annotations

import ctypes
import struct
from errno import EFAULT, EINVAL
from typing import Any

import pytest

from kvmapi.abi import caps, ioctls
from kvmapi.abi import vcpu as v
from kvmapi.errors import KvmError
from tests.conformance.rows import feature
from tests.conformance.snippets import DATA, LongGuest, Machine, code

HLT = code("f4", "hlt")
ONE_AND_A_HALF = (0xC000000000000000).to_bytes(8, "little") + (0x3FFF).to_bytes(2, "little")
THREE = ONE_AND_A_HALF[:8] + (0x4000).to_bytes(2, "little")
FXSAVE, MXCSR, XSTATE_BV, XCOMP_BV, RESERVED = 512, 24, 512, 520, 528
X87, SSE, UNKNOWN = 1, 2, 1 << 50


def set_image(guest: Machine, image: bytes | bytearray) -> int:
    """KVM_SET_XSAVE's raw result."""
    buffer = (ctypes.c_char * 16384).from_buffer_copy(bytes(image).ljust(16384, b"\0"))  # the kernel may read more than 4 KiB
    return guest.vcpu.ioctl_raw(ioctls.KVM_SET_XSAVE, ctypes.addressof(buffer))


def image_of(guest: Machine) -> bytearray:
    return bytearray(bytes(guest.vcpu.get_xsave()))


def in_use(guest: Machine) -> None:
    """Make x87 and SSE state present, as a guest does that uses both: KVM_SET_FPU does not do that by itself."""
    image = image_of(guest)
    struct.pack_into("<Q", image, XSTATE_BV, X87 | SSE)
    assert set_image(guest, image) == 0


def shared_with_the_guest(guest: Machine) -> None:
    """Skip where the guest's FPU is not the one that these ioctls show."""
    if not feature(guest, "hardware virtualization"):
        pytest.skip("paravirtual: what the guest does to its FPU is not in the vCPU's state, and the other way round")


def test_fpu_round_trip(any_host: Any) -> None:
    with LongGuest(any_host, HLT) as guest:
        in_use(guest)
        fpu = guest.vcpu.get_fpu()
        for number in range(8):
            fpu.fpr[number][:10] = [*ONE_AND_A_HALF[:8], number, 0x40]
        for number in range(16):
            fpu.xmm[number][:] = [number * 16 + n for n in range(16)]
        fpu.fcw, fpu.fsw, fpu.ftwx, fpu.last_opcode, fpu.last_ip, fpu.last_dp = 0x27F, 0x3800, 0xFF, 0x123, 0x1111222233334444, 0x55556666
        guest.vcpu.set_fpu(fpu)
        assert bytes(guest.vcpu.get_fpu()) == bytes(fpu)
        guest.run()
        after = guest.vcpu.get_fpu()
        assert (after.fcw, after.fsw, after.ftwx) == (fpu.fcw, fpu.fsw, fpu.ftwx)
        assert bytes(after.fpr) == bytes(fpu.fpr) and bytes(after.xmm) == bytes(fpu.xmm), "and after the guest was entered"


def test_set_fpu_is_lost_while_the_state_is_not_in_use(any_host: Any) -> None:
    """KVM_SET_FPU writes the legacy area and not the header of the XSAVE image in which KVM keeps the state, so a component that the
    header calls initial is initial again when the guest is entered. Who sets the state of a new vCPU uses KVM_SET_XSAVE.
    """
    with LongGuest(any_host, HLT) as guest:
        if not feature(guest, "XSAVE"):
            pytest.skip(f"{guest.host.name}: no XSAVE, so nothing is known to be initial")
        fpu = guest.vcpu.get_fpu()
        fpu.fcw, fpu.xmm[3][:] = 0x27F, [9] * 16
        guest.vcpu.set_fpu(fpu)
        assert guest.vcpu.get_fpu().fcw == 0x27F
        guest.run()
        after = guest.vcpu.get_fpu()
        assert after.fcw == 0x37F and not any(bytes(after.xmm))


def test_the_state_after_reset(any_host: Any) -> None:
    with Machine(any_host) as machine:
        fpu = machine.add_vcpu().get_fpu()
        assert (fpu.fcw, fpu.fsw, fpu.ftwx, fpu.mxcsr) == (0x37F, 0, 0, 0)
        assert not any(bytes(fpu.xmm))
        assert struct.unpack_from("<I", image_of(machine), MXCSR) == (0x1F80,)


def test_the_guest_computes_with_what_was_set(any_host: Any) -> None:
    text = code(
        "d8c00f58 c10fae1c 25000003 00d93c25 04000300 440f28f8 f4",
        "fadd st, st(0); addps xmm0, xmm1; stmxcsr [0x30000]; fnstcw [0x30004]; movaps xmm15, xmm0; hlt",
    )
    with LongGuest(any_host, text) as guest:
        shared_with_the_guest(guest)
        in_use(guest)
        fpu = guest.vcpu.get_fpu()
        fpu.fcw, fpu.fsw, fpu.ftwx = 0x27F, 5 << 11, 1 << 5  # TOP 5: ST(0) is the sixth physical register, and the only valid one
        fpu.fpr[0][:10] = list(ONE_AND_A_HALF)
        fpu.xmm[0][:] = list(struct.pack("<4f", 1, 2, 3, 4))
        fpu.xmm[1][:] = list(struct.pack("<4f", 10, 20, 30, 40))
        guest.vcpu.set_fpu(fpu)
        guest.run()
        after = guest.vcpu.get_fpu()
        assert bytes(after.fpr[0][:10]) == THREE and (after.fsw & 0x3800, after.ftwx) == (5 << 11, 1 << 5)
        assert struct.unpack("<4f", bytes(after.xmm[0])) == (11, 22, 33, 44) and bytes(after.xmm[15]) == bytes(after.xmm[0])
        assert struct.unpack("<IH", guest.get(DATA, 6)) == (0x1F80, 0x27F)


def test_what_the_guest_pushes(any_host: Any) -> None:
    with LongGuest(any_host, code("dbe3d9e8 d9ebf4", "fninit; fld1; fldpi; hlt")) as guest:
        shared_with_the_guest(guest)
        guest.run()
        fpu = guest.vcpu.get_fpu()
        assert (fpu.fsw >> 11 & 7, fpu.ftwx) == (6, 0xC0)
        assert bytes(fpu.fpr[1][:10]) == bytes(7) + b"\x80\xff\x3f", "ST(1) is 1.0"


def test_set_fpu_does_not_touch_mxcsr(any_host: Any) -> None:
    """struct kvm_fpu has a field for it that KVM neither reads nor writes."""
    with LongGuest(any_host, code("0fae1c25 00000300 f4", "stmxcsr [0x30000]; hlt")) as guest:
        shared_with_the_guest(guest)
        image = image_of(guest)
        struct.pack_into("<I", image, MXCSR, 0x3F80)
        struct.pack_into("<Q", image, XSTATE_BV, X87 | SSE)
        assert set_image(guest, image) == 0
        fpu = guest.vcpu.get_fpu()
        assert fpu.mxcsr == 0
        fpu.mxcsr = 0xFFFFFFFF
        guest.vcpu.set_fpu(fpu)
        guest.run()
        assert int.from_bytes(guest.get(DATA, 4), "little") == 0x3F80


def test_the_rounding_mode_counts(any_host: Any) -> None:
    text = code("f30f2dc0 db1c2500 000300f4", "cvtss2si eax, xmm0; fistp dword ptr [0x30000]; hlt")
    with LongGuest(any_host, text) as guest:
        shared_with_the_guest(guest)
        for fcw, mxcsr, rounded in ((0x37F, 0x1F80, 2), (0xF7F, 0x7F80, 1), (0xB7F, 0x5F80, 2)):  # nearest even, towards zero, up
            image = image_of(guest)
            struct.pack_into("<HHB", image, 0, fcw, 0, 1)
            struct.pack_into("<I", image, MXCSR, mxcsr)
            image[32:42] = ONE_AND_A_HALF
            image[160:164] = struct.pack("<f", 1.5)
            struct.pack_into("<Q", image, XSTATE_BV, X87 | SSE)
            assert set_image(guest, image) == 0
            guest.again()
            assert (guest.regs().rax, int.from_bytes(guest.get(DATA, 4), "little")) == (rounded, rounded)


def test_xsave_round_trip(any_host: Any) -> None:
    with LongGuest(any_host, code("d9e8660f 76fff4", "fld1; pcmpeqd xmm7, xmm7; hlt")) as guest:
        shared_with_the_guest(guest)
        guest.run()
        before = image_of(guest)
        assert before[160 + 7 * 16 : 160 + 8 * 16] == b"\xff" * 16
        fpu = guest.vcpu.get_fpu()
        guest.vcpu.set_fpu(v.kvm_fpu())
        assert image_of(guest)[160 + 7 * 16 : 160 + 8 * 16] == bytes(16)
        assert set_image(guest, before) == 0
        assert image_of(guest) == before and bytes(guest.vcpu.get_fpu()) == bytes(fpu)


def test_xsave2(any_host: Any) -> None:
    """Its size is KVM_CAP_XSAVE2's answer; the first 4 KiB are KVM_GET_XSAVE's."""
    with LongGuest(any_host, code("660f76ff f4", "pcmpeqd xmm7, xmm7; hlt")) as guest:
        shared_with_the_guest(guest)
        guest.run()
        size = guest.vm.check_extension(caps.KVM_CAP_XSAVE2)
        if not size:
            pytest.skip(f"{guest.host.name}: no KVM_CAP_XSAVE2")
        assert size >= ctypes.sizeof(v.kvm_xsave)
        buffer = (ctypes.c_char * (size + 64))(*[b"\xa5"] * (size + 64))
        assert guest.vcpu.ioctl_raw(ioctls.KVM_GET_XSAVE2, ctypes.addressof(buffer)) == 0
        assert bytes(buffer)[:4096] == bytes(image_of(guest)) and bytes(buffer)[size:] == b"\xa5" * 64


def test_components_that_are_not_there_are_in_their_initial_state(any_host: Any) -> None:
    with LongGuest(any_host, HLT) as guest:
        if not feature(guest, "XSAVE"):
            pytest.skip(f"{guest.host.name}: no XSAVE, so the header's bits have no meaning")
        image = image_of(guest)
        struct.pack_into("<HHB", image, 0, 0x27F, 0, 0xFF)
        image[160:176] = b"\x77" * 16
        struct.pack_into("<Q", image, XSTATE_BV, SSE)
        assert set_image(guest, image) == 0
        guest.again()
        fpu = guest.vcpu.get_fpu()
        assert bytes(fpu.xmm[0]) == b"\x77" * 16 and (fpu.fcw, fpu.ftwx) == (0x37F, 0)
        struct.pack_into("<Q", image, XSTATE_BV, X87)
        assert set_image(guest, image) == 0
        guest.again()
        fpu = guest.vcpu.get_fpu()
        assert not any(bytes(fpu.xmm)) and (fpu.fcw, fpu.ftwx) == (0x27F, 0xFF)


REFUSED = [
    ("unknown component", XSTATE_BV, "<Q", X87 | SSE | UNKNOWN),
    ("compacted format", XCOMP_BV, "<Q", 1 << 63),
    ("reserved header bytes", RESERVED, "<Q", 1),
    ("last reserved header byte", RESERVED + 47, "<B", 1),
    ("reserved MXCSR bits", MXCSR, "<I", 1 << 16 | 0x1F80),
]


@pytest.mark.parametrize(("name", "at", "layout", "value"), REFUSED, ids=[row[0] for row in REFUSED])
def test_images_that_are_refused(any_host: Any, name: str, at: int, layout: str, value: int) -> None:
    with LongGuest(any_host, HLT) as guest:
        if at > XSTATE_BV and not feature(guest, "XSAVE"):
            pytest.skip(f"{guest.host.name}: no XSAVE, so this part of the header is not looked at")
        image = image_of(guest)
        struct.pack_into("<Q", image, XSTATE_BV, X87 | SSE)
        struct.pack_into(layout, image, at, value)
        image[160] ^= 0xFF
        before = image_of(guest)
        assert set_image(guest, image) == -EINVAL
        assert image_of(guest) == before, "refused whole"


XCRS = [
    ("nothing", 0, 0, [], 0),
    ("x87", 1, 0, [(0, 1)], 0),
    ("x87 and SSE", 1, 0, [(0, 3)], 0),
    ("without x87", 1, 0, [(0, 2)], EINVAL),
    ("zero", 1, 0, [(0, 0)], EINVAL),
    ("unknown component", 1, 0, [(0, 1 | UNKNOWN)], EINVAL),
    ("another register is passed over", 2, 0, [(1, 0), (0, 1)], 0),
    ("only the first XCR0 counts", 2, 0, [(0, 1), (0, 0)], 0),
    ("too many", 17, 0, [(0, 1)], EINVAL),
    ("flags", 1, 1, [(0, 1)], EINVAL),
]


@pytest.mark.parametrize(("name", "count", "flags", "entries", "expected"), XCRS, ids=[row[0] for row in XCRS])
def test_xcrs(any_host: Any, name: str, count: int, flags: int, entries: list[tuple[int, int]], expected: int) -> None:
    with LongGuest(any_host, HLT) as guest:
        if not feature(guest, "XSAVE"):
            pytest.skip(f"{guest.host.name}: no XSAVE")
        xcrs = v.kvm_xcrs(nr_xcrs=count, flags=flags)
        for at, (register, value) in enumerate(entries):
            xcrs.xcrs[at].xcr, xcrs.xcrs[at].value = register, value
        result = guest.vcpu.ioctl_raw(ioctls.KVM_SET_XCRS, ctypes.addressof(xcrs))
        assert result == -expected
        got = guest.vcpu.get_xcrs()
        wanted = next((value for register, value in entries if register == 0 and not expected), 1)
        assert (got.nr_xcrs, got.flags, got.xcrs[0].xcr, got.xcrs[0].value) == (1, 0, 0, wanted)


def test_the_guest_reads_xcr0(any_host: Any) -> None:
    with LongGuest(any_host, code("31c90f01 d0f4", "xor ecx, ecx; xgetbv; hlt")) as guest:
        if not feature(guest, "XSAVE"):
            pytest.skip(f"{guest.host.name}: no XSAVE")
        sregs = guest.vcpu.get_sregs()
        sregs.cr4 |= 1 << 18
        guest.vcpu.set_sregs(sregs)
        xcrs = guest.vcpu.get_xcrs()
        for value in (3, 1):
            xcrs.xcrs[0].value = value
            guest.vcpu.set_xcrs(xcrs)
            guest.again(rdx=99)
            assert (guest.regs().rax, guest.regs().rdx) == (value, 0)


@pytest.mark.parametrize("name", ["GET_FPU", "SET_FPU", "GET_XSAVE", "SET_XSAVE", "GET_XSAVE2", "GET_XCRS", "SET_XCRS"])
def test_bad_pointers(any_host: Any, name: str) -> None:
    with LongGuest(any_host, HLT) as guest:
        for pointer in (0, 8, 1 << 63):
            assert guest.vcpu.ioctl_raw(getattr(ioctls, f"KVM_{name}"), pointer) == -EFAULT


def test_errors_have_names(any_host: Any) -> None:
    with LongGuest(any_host, HLT) as guest:
        xcrs = guest.vcpu.get_xcrs()
        xcrs.nr_xcrs = 17
        with pytest.raises(KvmError, match="KVM_SET_XCRS"):
            guest.vcpu.set_xcrs(xcrs)
