"""The table knows every request, and what it says about a request agrees with the request's own bits."""

from __future__ import annotations

import pytest

from kvmapi import rows, table
from kvmapi.abi import caps, ioctls, psp, sev, structs, vcpu
from kvmapi.abi.encoding import decode_request

REQUESTS = {n: v for n, v in vars(ioctls).items() if n.startswith("KVM_") and isinstance(v, int) and n != "KVMIO"}


def test_every_request_has_a_row_and_every_row_a_request() -> None:
    named = {row.name for row in table.rows() if row.on != "sev"}
    assert named == set(REQUESTS)
    assert {row.number for row in table.rows() if row.on != "sev"} == set(REQUESTS.values())


@pytest.mark.parametrize("row", table.rows(), ids=lambda r: f"{r.on}-{r.name}")
def test_row_is_sound(row: table.Ioctl) -> None:
    assert table.row(row.on, row.number) is row
    assert row.words and row.words[-1] != "."
    assert row.capability is None or hasattr(caps, row.capability)
    request = decode_request(row.number)
    if row.arg in ("none", "value"):
        assert row.struct is None and row.size == 0
    elif row.name in ("KVM_MEMORY_ENCRYPT_OP", "KVM_REINJECT_CONTROL"):
        assert row.size in (24, 32)  # declared with another size than they use
    else:
        assert row.size == request.size
    assert (row.entry is None) == (row.arg != "header+entries")
    if row.entry is not None:
        assert row.count is not None and row.struct is not None and hasattr(row.struct, row.count)
        assert row.reads or row.writes


def test_lookup_takes_the_low_32_bits() -> None:
    assert table.row("vcpu", ioctls.KVM_GET_REGS - (1 << 32)) is table.named("KVM_GET_REGS")
    assert table.row("guest_memfd", ioctls.KVM_GET_REGS) is None
    assert table.any_row(ioctls.KVM_RUN) is table.named("KVM_RUN", "vcpu")
    with pytest.raises(KeyError):
        table.named("KVM_NO_SUCH")


def test_total_size_counts_entries() -> None:
    row = table.named("KVM_SET_MSRS")
    assert row.total_size(vcpu.kvm_msrs(nmsrs=3)) == 8 + 3 * 16
    assert table.named("KVM_SET_REGS").total_size(vcpu.kvm_regs()) == 144


def test_commands_cover_all_ids() -> None:
    assert {c.id for c in table.commands(ioctls.KVM_MEMORY_ENCRYPT_OP)} == set(sev.COMMAND_NAMES)
    assert [c.id for c in table.commands(psp.SEV_ISSUE_CMD)] == list(range(13))
    start = table.command(ioctls.KVM_MEMORY_ENCRYPT_OP, sev.KVM_SEV_LAUNCH_START)
    assert start is not None and start.name == "KVM_SEV_LAUNCH_START" and start.struct is sev.kvm_sev_launch_start
    assert table.command(psp.SEV_ISSUE_CMD, 99) is None


def test_arguments_decode_without_padding_or_contents() -> None:
    region = structs.kvm_userspace_memory_region2(slot=1, guest_memfd=5)
    assert "pad2" not in table.decode_struct(region) and table.decode_struct(region)["guest_memfd"] == 5
    report = sev.kvm_sev_attestation_report()
    report.mnonce[:] = b"secret nonce 123"
    assert table.decode_struct(report)["mnonce"] == "<16 bytes>"
    assert table.decode_struct(structs.kvm_dirty_log(slot=2)) == {"slot": 2, "dirty_bitmap": 0}
    assert rows.decode_argument(table.named("KVM_CREATE_VM"), 2) == {"arg": 2}
    assert rows.decode_argument(table.named("KVM_RUN"), 0) == {}
