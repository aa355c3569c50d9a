"""What a recording says of an ioctl: every row of the table decodes, hostile arguments are bounded, payload is never read."""

from __future__ import annotations

import ctypes
import errno
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmapi import table
from kvmapi.abi import ioctls, kvm, psp, sev, structs, vcpu
from kvmapi.abi.run import EXIT_UNION_OFFSET, kvm_run
from kvmapi.model.caller import Errno
from vmm.exec.decode import MOST_ENTRIES, Decoder, exit_fields

ARGUMENT, DATA, PAYLOAD = 0x10000, 0x20000, 0x30000


class Memory:
    """A caller's memory: pieces at addresses. What was read is kept, so that a test can say what must not be."""

    def __init__(self, **_: object) -> None:
        self.pieces: dict[int, bytearray] = {}
        self.touched: list[tuple[int, int]] = []

    def put(self, address: int, *parts: Any) -> None:
        self.pieces[address] = bytearray(b"".join(bytes(part) for part in parts))

    def read(self, address: int, size: int) -> bytes:
        self.touched.append((address, size))
        for start, piece in self.pieces.items():
            if start <= address and address + size <= start + len(piece):
                return bytes(piece[address - start : address - start + size])
        raise Errno(errno.EFAULT)


@pytest.fixture
def memory() -> Memory:
    return Memory()


def test_struct_that_comes_in(memory: Memory) -> None:
    memory.put(ARGUMENT, structs.kvm_userspace_memory_region(3, 1, 0xC0000000, 0x200000, 0x7F0000000000))
    call = Decoder().before("vm", ioctls.KVM_SET_USER_MEMORY_REGION, ARGUMENT, memory.read)
    assert call.name == "KVM_SET_USER_MEMORY_REGION"
    expected = {"slot": 3, "flags": "0x1", "guest_phys_addr": "0xc0000000", "memory_size": 0x200000, "userspace_addr": "0x7f0000000000"}
    assert call.fields == expected
    assert Decoder().after(call, ARGUMENT, 0, memory.read) == {}
    assert memory.touched == [(ARGUMENT, ctypes.sizeof(structs.kvm_userspace_memory_region))]


def test_struct_that_goes_out_is_read_afterwards_only(memory: Memory) -> None:
    memory.put(ARGUMENT, vcpu.kvm_regs(rax=0xDEAD))
    call = Decoder().before("vcpu", ioctls.KVM_GET_REGS, ARGUMENT, memory.read)
    assert call.fields == {}
    assert memory.touched == []
    assert Decoder().after(call, ARGUMENT, 0, memory.read)["rax"] == "0xdead"
    assert Decoder().after(call, ARGUMENT, -errno.EINVAL, memory.read) == {}


def test_of_what_goes_both_ways_the_change_comes_back(memory: Memory) -> None:
    memory.put(ARGUMENT, vcpu.kvm_pre_fault_memory(0x1000, 0x3000, 0))
    decoder = Decoder()
    call = decoder.before("vcpu", ioctls.KVM_PRE_FAULT_MEMORY, ARGUMENT, memory.read)
    assert call.fields == {"gpa": "0x1000", "size": 0x3000, "flags": "0x0"}
    memory.put(ARGUMENT, vcpu.kvm_pre_fault_memory(0x1000, 0x2000, 0))
    assert decoder.after(call, ARGUMENT, -errno.EINTR, memory.read) == {"size": 0x2000}


def test_what_is_only_filled_in_is_not_shown_before_it_is(memory: Memory) -> None:
    """What stands there before the call is whatever the program kept there last."""
    decoder, stale = Decoder(), b"\x5a" * 4096
    header = vcpu.kvm_cpuid2()
    header.nent = 2
    memory.put(ARGUMENT, header, stale)
    call = decoder.before("system", ioctls.KVM_GET_SUPPORTED_CPUID, ARGUMENT, memory.read)
    assert call.fields == {"nent": 2}
    assert decoder.after(call, ARGUMENT, -errno.E2BIG, memory.read) == {}
    memory.put(ARGUMENT, header, vcpu.kvm_cpuid_entry2(function=1), vcpu.kvm_cpuid_entry2(function=2))
    shown: Any = decoder.after(call, ARGUMENT, 0, memory.read)["entries"]
    assert [entry["function"] for entry in shown] == ["0x1", "0x2"]
    memory.put(ARGUMENT, vcpu.kvm_translation(linear_address=0x1000, physical_address=0x5A5A5A, valid=1))
    call = decoder.before("vcpu", ioctls.KVM_TRANSLATE, ARGUMENT, memory.read)
    assert call.fields == {"linear_address": "0x1000"}
    assert decoder.after(call, ARGUMENT, 0, memory.read)["physical_address"] == "0x5a5a5a"


def test_of_msrs_that_are_read_the_index_comes_in_and_what_was_read_goes_out(memory: Memory) -> None:
    header = vcpu.kvm_msrs()
    header.nmsrs = 3
    memory.put(ARGUMENT, header, *(vcpu.kvm_msr_entry(index=0x174 + at, data=0x5A5A) for at in range(3)))
    call = Decoder().before("vcpu", ioctls.KVM_GET_MSRS, ARGUMENT, memory.read)
    assert call.fields["entries"] == [{"index": "0x174"}, {"index": "0x175"}, {"index": "0x176"}]
    shown: Any = Decoder().after(call, ARGUMENT, 2, memory.read)["entries"]
    assert [entry["index"] for entry in shown] == ["0x174", "0x175"]


@pytest.mark.parametrize("announced", [2, MOST_ENTRIES + 1, 0xFFFFFFFF])
def test_entries_are_bounded(announced: int, memory: Memory) -> None:
    entries = [vcpu.kvm_msr_entry(index=0x174 + at, data=at) for at in range(MOST_ENTRIES)]
    header = vcpu.kvm_msrs()
    header.nmsrs = announced
    memory.put(ARGUMENT, header, *entries)
    shown = Decoder().before("vcpu", ioctls.KVM_SET_MSRS, ARGUMENT, memory.read).fields["entries"]
    assert shown[1]["index"] == "0x175"
    assert len(shown) == min(announced, MOST_ENTRIES + 1)
    assert (shown[-1] == f"and {announced - MOST_ENTRIES} more") == (announced > MOST_ENTRIES)


def test_numbers_have_names() -> None:
    def arg(request: int, value: int) -> object:
        return Decoder().before("system", request, value, Memory().read).fields["arg"]

    assert arg(ioctls.KVM_CHECK_EXTENSION, 3) == "KVM_CAP_USER_MEMORY"
    assert str(arg(ioctls.KVM_CREATE_VM, kvm.KVM_X86_SEV_ES_VM)).startswith("3 ")
    assert arg(ioctls.KVM_CHECK_EXTENSION, 1 << 63) == hex(1 << 63)


def test_dialect_has_its_own_numbers(memory: Memory) -> None:
    from kvmapi.abi.dialects import KVM_SET_MEMORY_ATTR, kvm_memory_attr

    memory.put(ARGUMENT, kvm_memory_attr(0x4000, 0x1000, 2))
    assert Decoder("attr-2022").before("vm", KVM_SET_MEMORY_ATTR, ARGUMENT, memory.read).fields["addr"] == "0x4000"


def test_unknown_request() -> None:
    call = Decoder().before("vm", 0xAEFE, 5, Memory().read)
    assert (call.name, call.fields) == ("0x0000aefe", {"arg": "0x5"})
    assert Decoder().after(call, 5, -errno.ENOTTY, Memory().read) == {}


def command(memory: Memory, number: int, struct: ctypes.Structure) -> tuple[Decoder, Any]:
    memory.put(DATA, struct)
    memory.put(ARGUMENT, sev.kvm_sev_cmd(id=number, data=DATA, sev_fd=7))
    decoder = Decoder()
    return decoder, decoder.before("vm", ioctls.KVM_MEMORY_ENCRYPT_OP, ARGUMENT, memory.read)


def test_secret_is_an_address_and_a_length(memory: Memory) -> None:
    memory.put(PAYLOAD, b"the owner's secret".ljust(4096))
    secret = sev.kvm_sev_launch_secret(hdr_uaddr=PAYLOAD, hdr_len=52, guest_uaddr=PAYLOAD, guest_len=16, trans_uaddr=PAYLOAD, trans_len=16)
    decoder, call = command(memory, sev.KVM_SEV_LAUNCH_SECRET, secret)
    assert call.command == "KVM_SEV_LAUNCH_SECRET"
    assert (call.fields["trans_uaddr"], call.fields["trans_len"], call.fields["sev_fd"]) == (hex(PAYLOAD), 16, 7)
    decoder.after(call, ARGUMENT, 0, memory.read)
    assert not [address for address, _ in memory.touched if address >= PAYLOAD]


def test_nonce_is_its_length(memory: Memory) -> None:
    report = sev.kvm_sev_attestation_report(uaddr=PAYLOAD, len=64)
    report.mnonce[:] = b"0123456789abcdef"
    _, call = command(memory, sev.KVM_SEV_GET_ATTESTATION_REPORT, report)
    assert call.fields["mnonce"] == "<16 bytes>"


def test_command_that_the_firmware_refuses(memory: Memory) -> None:
    decoder, call = command(memory, sev.KVM_SEV_LAUNCH_MEASURE, sev.kvm_sev_launch_measure(uaddr=0, len=0))
    memory.put(DATA, sev.kvm_sev_launch_measure(uaddr=0, len=48))
    memory.put(ARGUMENT, sev.kvm_sev_cmd(id=sev.KVM_SEV_LAUNCH_MEASURE, data=DATA, error=4, sev_fd=7))
    out = decoder.after(call, ARGUMENT, -errno.EIO, memory.read)
    assert out["len"] == 48
    assert "INVALID_LEN" in out["firmware"]


def test_platform_command(memory: Memory) -> None:
    memory.put(DATA, psp.sev_user_data_status(guest_count=0x5A5A))
    memory.put(ARGUMENT, psp.sev_issue_cmd(psp.SEV_PLATFORM_STATUS, DATA, 0))
    call = Decoder().before("sev", psp.SEV_ISSUE_CMD, ARGUMENT, memory.read)
    assert call.command == "SEV_PLATFORM_STATUS"
    status = psp.sev_user_data_status()
    status.guest_count = 3
    memory.put(DATA, status)
    assert call.fields == {}
    assert Decoder().after(call, ARGUMENT, 0, memory.read)["guest_count"] == "0x3"
    assert Decoder().after(call, ARGUMENT, -errno.EIO, memory.read) == {}


@pytest.mark.parametrize("which", list(table.rows()), ids=lambda row: f"{row.on}-{row.name}")
def test_every_row_survives_wild_pointers_and_zeroes(which: table.Ioctl) -> None:
    for read in (Memory().read, zeroes, ones):
        call = Decoder().before(which.on, which.number, ARGUMENT, read)
        assert call.name == which.name
        for result in (0, -errno.EFAULT, -errno.EINVAL):
            out = Decoder().after(call, ARGUMENT, result, read)
            assert len(json.dumps([call.fields, out])) < 32768


def zeroes(address: int, size: int) -> bytes:
    assert size <= 65536
    return bytes(size)


def ones(address: int, size: int) -> bytes:
    assert size <= 65536
    return b"\xff" * size


def every_command() -> list[tuple[int, table.Command]]:
    return [(request, found) for request in (ioctls.KVM_MEMORY_ENCRYPT_OP, psp.SEV_ISSUE_CMD) for found in table.commands(request)]


@pytest.mark.parametrize(("request_", "which"), every_command(), ids=lambda value: getattr(value, "name", ""))
def test_every_command_survives(request_: int, which: table.Command) -> None:
    made = sev.kvm_sev_cmd(id=which.id, data=DATA) if request_ == ioctls.KVM_MEMORY_ENCRYPT_OP else psp.sev_issue_cmd(which.id, DATA, 0)

    def read_of(fill: Callable[[int, int], bytes]) -> Callable[[int, int], bytes]:
        return lambda address, size: bytes(made) if address == ARGUMENT else fill(address, size)

    for read in (Memory().read, read_of(zeroes), read_of(ones), read_of(Memory().read)):
        call = Decoder().before("vm", request_, ARGUMENT, read)
        assert json.dumps([call.fields, Decoder().after(call, ARGUMENT, -errno.EIO, read)])
        assert call.command in (None, which.name)


PUBLIC = frozenset({
    "sev_fd", "handle", "policy", "state", "flags", "len", "vmsa_features", "ghcb_version", "gfn_start", "type", "length", "api_major",
    "api_minor", "build", "build_id", "guest_count", "is_rmp_initialized", "mask_chip_id", "mask_chip_key", "vlek_en", "feature_info",
    "rapl_dis", "ciphertext_hiding_cap", "ciphertext_hiding_en", "current_tcb_version", "reported_tcb_version", "reported_tcb",
    "id_block_en", "auth_key_en", "vcek_disabled", "vlek_wrapped_version",
})  # fmt: skip


@pytest.mark.parametrize(
    ("request_", "which"), [row for row in every_command() if row[1].struct is not None], ids=lambda value: getattr(value, "name", "")
)
def test_of_a_command_only_what_is_public_is_shown(request_: int, which: table.Command, memory: Memory) -> None:
    """Every field is one that this list calls public, an address, a length, or only its own size; payload is not even read."""
    assert which.struct is not None
    made = sev.kvm_sev_cmd(id=which.id, data=DATA) if request_ == ioctls.KVM_MEMORY_ENCRYPT_OP else psp.sev_issue_cmd(which.id, DATA, 0)
    memory.put(ARGUMENT, made)
    memory.put(DATA, b"\x5a" * ctypes.sizeof(which.struct))
    call = Decoder().before("vm", request_, ARGUMENT, memory.read)
    memory.put(DATA, b"\x5b" * ctypes.sizeof(which.struct))
    for name, value in {**call.fields, **Decoder().after(call, ARGUMENT, 0, memory.read)}.items():
        place = name.endswith(("uaddr", "_address", "_len")) or name == "address"
        assert place or name in PUBLIC or str(value).endswith(" bytes>"), name
    assert {address for address, _ in memory.touched} == {ARGUMENT, DATA}


def test_what_kvm_run_is_asked_for() -> None:
    from vmm.exec.decode import run_fields

    page = bytearray(b"\0" * 12288)
    assert run_fields(page) == {}
    run = kvm_run.from_buffer(page)
    run.immediate_exit, run.request_interrupt_window, run.cr8 = 1, 1, 0xF
    run.kvm_valid_regs, run.kvm_dirty_regs = 5, 1 << 63 | kvm.KVM_SYNC_X86_SREGS
    run.exit_reason, run.mmio.data[0], page[4096] = kvm.KVM_EXIT_MMIO, 0x5A, 0x5A
    assert run_fields(page) == {
        "request_interrupt_window": 1, "immediate_exit": 1, "cr8": "0xf", "kvm_valid_regs": ["regs", "events"],
        "kvm_dirty_regs": ["sregs", hex(1 << 63)],
    }  # fmt: skip


def test_exits() -> None:
    page = bytearray(8192)
    run = kvm_run.from_buffer(page)
    run.exit_reason = kvm.KVM_EXIT_IO
    run.io.direction, run.io.size, run.io.port, run.io.count, run.io.data_offset = kvm.KVM_EXIT_IO_OUT, 1, 0x3F8, 1, 4096
    page[4096:4100] = b"Key!"
    shown = exit_fields(page, 0)
    assert (shown["reason"], shown["port"], shown["data"]) == ("IO", "0x3f8", "0x4b")
    run.io.count = 4
    assert exit_fields(page, 0)["data"] == "<4 bytes>"
    run.io.direction = kvm.KVM_EXIT_IO_IN
    assert "data" not in exit_fields(page, 0)
    run.io.data_offset = 1 << 40
    assert exit_fields(page, 0)["reason"] == "unreadable"
    assert exit_fields(page, -errno.EINTR) == {"reason": "INTR"}


def test_instruction_bytes_stay_out() -> None:
    page = bytearray(8192)
    kvm_run.from_buffer(page).exit_reason = kvm.KVM_EXIT_INTERNAL_ERROR
    page[EXIT_UNION_OFFSET : EXIT_UNION_OFFSET + 17] = bytes([1, 0, 0, 0, 4, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 3])
    page[EXIT_UNION_OFFSET + 17 : EXIT_UNION_OFFSET + 32] = b"\x0f\x01\xd9" + bytes(12)
    shown = exit_fields(page, 0)
    assert shown["insn_bytes"] == "<3 bytes>"
    assert shown["data"] == "<4 items>"


@given(st.binary(min_size=288, max_size=288), st.integers(0, 60), st.sampled_from([0, -errno.EFAULT, -errno.EINTR, -errno.EIO]))
def test_any_kvm_run_is_json(data: bytes, reason: int, result: int) -> None:
    page = bytearray(data).ljust(12288, b"\xa5")
    kvm_run.from_buffer(page).exit_reason = reason
    assert len(json.dumps(exit_fields(page, result))) < 4096
