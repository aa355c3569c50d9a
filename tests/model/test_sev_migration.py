"""SEND_* and RECEIVE_* through the ioctl: KVM's checks, length queries, write-backs, and a guest that travels to
another machine.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from errno import EBADF, EFAULT, EINVAL, ENOMEM, ENOTTY
from typing import Any

import pytest

from kvmapi.abi import psp, sev
from kvmapi.model.host import ModelHost
from tests.conformance.snippets import PAGE
from tests.model.sev_vm import BAD, FIRMWARE, UNTOUCHED, Sev, at, buffer, change, packet, peer, sev_at_fd_zero

pytestmark = pytest.mark.model
HEADER, SESSION = 52, 128


class Traveller(Sev):
    """A running guest with two pages of its own, or (`receive`) a VM that waits for one."""

    def packet(self, address: int, size: int = PAGE, **changes: int) -> tuple[tuple[int, int], bytes, bytes, Any]:
        """SEND_UPDATE_DATA: outcome, header, ciphertext, struct afterwards."""
        header, trans = ctypes.create_string_buffer(64), ctypes.create_string_buffer(PAGE + 64)
        data = packet(header, HEADER, address, size, trans, size)
        change(data, **changes)
        outcome = self.op(sev.KVM_SEV_SEND_UPDATE_DATA, data)
        return outcome, header.raw[:HEADER], trans.raw[:size], data

    def take(self, header: bytes, trans: bytes, address: int, **changes: int) -> tuple[int, int]:
        """RECEIVE_UPDATE_DATA."""
        head, body = ctypes.create_string_buffer(header, len(header)), ctypes.create_string_buffer(trans, len(trans))
        data = packet(head, len(header), address, len(trans), body, len(trans))
        change(data, **changes)
        return self.op(sev.KVM_SEV_RECEIVE_UPDATE_DATA, data)

    def receive(self, source: Any, session: bytes, policy: int = 0, **changes: int) -> tuple[int, int]:
        """RECEIVE_START from the machine `source`."""
        pdh, blob = peer(source)[0], ctypes.create_string_buffer(session, len(session))
        self.received = sev.kvm_sev_receive_start(0, policy, at(pdh), len(pdh), 0, at(blob), len(session), 0)
        change(self.received, **changes)
        return self.op(sev.KVM_SEV_RECEIVE_START, self.received)

    def run_with(self, plain: bytes, policy: int | None = None) -> None:
        """Launch it with these contents."""
        self.to("started", policy)
        self.put(0, plain)
        assert self.update(size=len(plain)) == self.measure() == self.finish() == (0, 0)

    def contents(self, size: int) -> bytes:
        with buffer(size // PAGE) as out:
            assert self.debug(sev.KVM_SEV_DBG_DECRYPT, self.hva, out.address, size) == (0, 0)
            return out.memory[:size]


@pytest.fixture
def vm(model_host: Any) -> Iterator[Traveller]:
    with Traveller(model_host) as made:
        yield made


def blobs_of(destination: Any) -> dict[str, int]:
    """SEND_START's certificates, of that machine. They live as long as the machine."""
    made = destination.kept = peer(destination)
    names = ("pdh_cert", "plat_certs", "amd_certs")
    return {key: value for name, blob in zip(names, made) for key, value in ((f"{name}_uaddr", at(blob)), (f"{name}_len", len(blob)))}


def test_a_guest_travels(model_host: Any) -> None:
    other, plain = ModelHost(), os.urandom(3 * PAGE)
    with Traveller(model_host) as here, Traveller(other) as there:
        here.run_with(plain)
        outcome, start, session = here.send_start(**blobs_of(other))
        assert outcome == (0, 0) and (start.policy, start.session_len) == (0, SESSION) and here.state() == sev.SEV_STATE_SEND_UPDATE
        there.to("init")
        assert there.receive(model_host, session) == (0, 0) and there.status() == (there.received.handle, 0, sev.SEV_STATE_RECEIVE_UPDATE)
        for offset, size in ((0, PAGE), (PAGE, 16), (PAGE + 16, PAGE - 16), (2 * PAGE, PAGE)):
            outcome, header, trans, _ = here.packet(here.hva + offset, size)
            assert outcome == (0, 0) and plain[offset : offset + size] != trans
            assert there.take(header, trans, there.hva + offset) == (0, 0)
        assert here.op(sev.KVM_SEV_SEND_FINISH) == (0, 0) and here.state() == sev.SEV_STATE_SENT
        assert there.op(sev.KVM_SEV_RECEIVE_FINISH) == (0, 0) and there.state() == sev.SEV_STATE_RUNNING
        assert there.contents(3 * PAGE) == plain and there.get(0, PAGE) != here.get(0, PAGE)


# ---- SEND_START
def test_send_start_asks_for_the_length(vm: Traveller) -> None:
    vm.to("running")
    outcome, data, _ = vm.send_start(session_len=0, pdh_cert_uaddr=0, session_uaddr=BAD)
    assert outcome == FIRMWARE["INVALID_LEN"] and (data.session_len, data.policy) == (SESSION, 0x77)
    assert vm.state() == sev.SEV_STATE_RUNNING


def test_a_query_in_the_wrong_state_says_0(vm: Traveller) -> None:
    vm.to("measured")
    outcome, data, _ = vm.send_start(session_len=0)
    assert outcome == FIRMWARE["INVALID_GUEST_STATE"] and data.session_len == 0


def test_send_start_arguments(vm: Traveller) -> None:
    vm.to("running")
    assert vm.op(sev.KVM_SEV_SEND_START, BAD) == (EFAULT, UNTOUCHED)
    for changes, expected in (
        ({"pdh_cert_uaddr": 0}, EINVAL), ({"pdh_cert_len": 0}, EINVAL), ({"session_uaddr": 0}, EINVAL), ({"session_len": 0x4001}, EINVAL),
        ({"pdh_cert_len": 0x4001}, EINVAL), ({"pdh_cert_uaddr": BAD}, EFAULT), ({"plat_certs_uaddr": 0}, EINVAL),
        ({"plat_certs_len": 0}, EINVAL), ({"plat_certs_uaddr": BAD}, EFAULT), ({"amd_certs_len": 0}, EINVAL),
        ({"amd_certs_uaddr": BAD}, EFAULT),
        ({"plat_certs_uaddr": BAD, "amd_certs_len": 0}, EFAULT), ({"pdh_cert_uaddr": BAD, "plat_certs_len": 0}, EFAULT),
    ):  # fmt: skip
        outcome, data, _ = vm.send_start(**changes)
        assert outcome == (expected, UNTOUCHED) and data.policy == 0x77, changes
    assert vm.state() == sev.SEV_STATE_RUNNING


def test_a_refused_start_is_written_back_without_policy(vm: Traveller) -> None:
    vm.to("running")
    outcome, data, _ = vm.send_start(session_len=SESSION - 1)
    assert outcome == FIRMWARE["INVALID_LEN"] and (data.policy, data.session_len) == (0, SESSION)
    outcome, data, _ = vm.send_start(pdh_cert_len=16)
    assert outcome[0] == 5 and outcome[1] in (psp.SEV_RET_INVALID_CERTIFICATE, psp.SEV_RET_INVALID_LEN)
    assert (data.policy, data.session_len) == (0, SESSION) and vm.state() == sev.SEV_STATE_RUNNING


def test_a_longer_session_buffer_is_filled_with_zeroes(vm: Traveller) -> None:
    vm.to("running", policy=sev.SEV_POLICY_NODBG)
    outcome, data, session = vm.send_start(session_len=0x200)
    assert outcome == (0, 0) and (data.policy, data.session_len) == (sev.SEV_POLICY_NODBG, SESSION)
    assert any(session[:SESSION]) and not any(session[SESSION:]) and len(session) == 0x200


def test_a_session_that_cannot_be_copied(vm: Traveller) -> None:
    vm.to("running")
    outcome, data, _ = vm.send_start(session_uaddr=BAD)
    assert outcome == (EFAULT, 0) and data.policy == 0x77, "the struct is not written either"
    assert vm.state() == sev.SEV_STATE_SEND_UPDATE, "but the guest is on its way"
    assert vm.op(sev.KVM_SEV_SEND_CANCEL) == (0, 0) and vm.state() == sev.SEV_STATE_RUNNING


def test_nosend(vm: Traveller) -> None:
    vm.to("running", policy=sev.SEV_POLICY_NOSEND)
    assert vm.send_start()[0] == FIRMWARE["POLICY_FAILURE"]


# ---- SEND_UPDATE_DATA
@pytest.mark.parametrize("changes", [{"hdr_len": 0}, {"trans_len": 0}, {"hdr_len": 0, "trans_len": 0, "hdr_uaddr": 0, "guest_len": 0}])
def test_packet_lengths(vm: Traveller, changes: dict[str, int]) -> None:
    vm.to("sending")
    outcome, _, _, data = vm.packet(vm.hva, **changes)
    assert outcome == FIRMWARE["INVALID_LEN"] and (data.hdr_len, data.trans_len) == (HEADER, PAGE)


def test_packet_lengths_of_a_guest_that_is_not_sent(vm: Traveller) -> None:
    vm.to("running")
    outcome, _, _, data = vm.packet(vm.hva, hdr_len=0)
    assert outcome == FIRMWARE["INVALID_GUEST_STATE"] and (data.hdr_len, data.trans_len) == (0, 0)
    vm.device.close()
    outcome, _, _, data = vm.packet(vm.hva, trans_len=0)
    assert outcome == (EBADF, UNTOUCHED) and (data.hdr_len, data.trans_len) == (0, 0)


def test_send_update_arguments(vm: Traveller) -> None:
    vm.to("sending")
    assert vm.op(sev.KVM_SEV_SEND_UPDATE_DATA, BAD) == (EFAULT, UNTOUCHED)
    for changes, expected in (
        ({"trans_uaddr": 0}, EINVAL), ({"guest_uaddr": 0}, EINVAL), ({"guest_len": 0}, EINVAL), ({"hdr_uaddr": 0}, EINVAL),
        ({"guest_len": PAGE + 1}, EINVAL), ({"guest_uaddr": vm.hva + 16}, EINVAL), ({"guest_len": 0xFFFFFFF0}, EINVAL),
        ({"guest_uaddr": BAD, "guest_len": 16}, ENOMEM), ({"hdr_len": (4 << 20) + 1}, ENOMEM), ({"trans_len": 0xFFFFFFFF}, ENOMEM),
    ):  # fmt: skip
        outcome, _, _, data = vm.packet(vm.hva, **changes)
        assert outcome == (expected, UNTOUCHED), changes
    outcome, header, trans, data = vm.packet(vm.hva, hdr_len=HEADER - 1)
    assert outcome == FIRMWARE["INVALID_LEN"] and data.hdr_len == HEADER - 1 and not any(header + trans)
    assert vm.packet(vm.hva, trans_len=PAGE - 1)[0] == FIRMWARE["INVALID_LEN"]
    assert vm.packet(vm.hva, 24)[0] == FIRMWARE["INVALID_LEN"] and vm.packet(vm.hva + 8, 16)[0] == FIRMWARE["INVALID_ADDRESS"]


def test_packets_that_cannot_be_copied(vm: Traveller) -> None:
    vm.to("sending")
    outcome, header, _, _ = vm.packet(vm.hva, trans_uaddr=BAD)
    assert outcome == (EFAULT, 0) and not any(header), "the ciphertext goes first"
    outcome, _, trans, _ = vm.packet(vm.hva, hdr_uaddr=BAD)
    assert outcome == (EFAULT, 0) and any(trans)


def test_read_only_memory_can_be_sent(vm: Traveller) -> None:
    vm.to("sending")
    with buffer() as memory:
        memory.forbid(0, 1)
        assert vm.packet(memory.address)[0] == (0, 0)


def test_longer_buffers_are_filled_with_zeroes(vm: Traveller) -> None:
    vm.to("sending")
    header, trans = ctypes.create_string_buffer(b"\xff" * 80, 80), ctypes.create_string_buffer(b"\xff" * 80, 80)
    outcome, _, _, data = vm.packet(vm.hva, 16, hdr_uaddr=at(header), hdr_len=64, trans_uaddr=at(trans), trans_len=32)
    assert outcome == (0, 0) and (data.hdr_len, data.trans_len) == (64, 32)
    assert header.raw[HEADER:] == bytes(64 - HEADER) + b"\xff" * 16 and trans.raw[16:] == bytes(16) + b"\xff" * 48


# ---- RECEIVE_*
@pytest.fixture
def sent(vm: Traveller) -> Traveller:
    """A guest on its way, with its session and one packet."""
    vm.run_with(b"travel" * 600 + bytes(PAGE - 3600))
    outcome, _, vm.session = vm.send_start()
    assert outcome == (0, 0)
    _, vm.header, vm.trans, _ = vm.packet(vm.hva)
    return vm


def test_receive_start_arguments(sent: Traveller) -> None:
    with Traveller(sent.host) as there:
        assert there.receive(sent.host, sent.session) == (ENOTTY, UNTOUCHED)
        there.to("init")
        assert there.op(sev.KVM_SEV_RECEIVE_START, BAD) == (EFAULT, UNTOUCHED)
        for changes, expected in (
            ({"pdh_uaddr": 0}, EINVAL), ({"pdh_len": 0}, EINVAL), ({"session_uaddr": 0}, EINVAL), ({"session_len": 0}, EINVAL),
            ({"pdh_len": 0x4001}, EINVAL), ({"pdh_uaddr": BAD}, EFAULT),
            ({"session_uaddr": BAD}, EFAULT), ({"session_len": 0x4001}, EINVAL),
            ({"pdh_uaddr": BAD, "session_len": 0}, EINVAL), ({"pdh_uaddr": BAD, "session_len": 0x4001}, EFAULT),
        ):  # fmt: skip
            assert there.receive(sent.host, sent.session, **changes) == (expected, UNTOUCHED), changes
        assert there.receive(sent.host, sent.session[:-1]) == FIRMWARE["INVALID_LEN"]
        assert there.receive(sent.host, sent.session, policy=1) == FIRMWARE["BAD_MEASUREMENT"], "another policy than the session's"
        assert there.guests == 1 and there.receive(sent.host, sent.session) == (0, 0) and there.guests == 2
        assert there.receive(sent.host, sent.session) == FIRMWARE["ASID_OWNED"] and there.guests == 2


def test_a_start_that_cannot_be_told_is_undone(sent: Traveller) -> None:
    with Traveller(sent.host) as there, buffer() as memory:
        there.to("init")
        pdh, blob = peer(sent.host)[0], ctypes.create_string_buffer(sent.session, SESSION)
        memory.fill(bytes(sev.kvm_sev_receive_start(0, 0, at(pdh), len(pdh), 0, at(blob), SESSION, 0)))
        memory.forbid(0, 1)
        assert there.op(sev.KVM_SEV_RECEIVE_START, memory.address) == (EFAULT, 0) and there.guests == 1
        assert there.receive(sent.host, sent.session) == (0, 0)


def test_receive_update_arguments(sent: Traveller) -> None:
    with Traveller(sent.host) as there:
        assert there.take(sent.header, sent.trans, there.hva) == (EINVAL, UNTOUCHED), "not ENOTTY: KVM's one exception"
        there.to("init")
        assert there.take(sent.header, sent.trans, there.hva) == (EBADF, UNTOUCHED)
        with sev_at_fd_zero(sent.host):
            assert there.take(sent.header, sent.trans, there.hva) == FIRMWARE["INVALID_GUEST"]
        assert there.receive(sent.host, sent.session) == (0, 0)
        assert there.op(sev.KVM_SEV_RECEIVE_UPDATE_DATA, BAD) == (EFAULT, UNTOUCHED)
        before = there.get(0, 2 * PAGE)
        for changes, expected in (
            *(({name: 0}, EINVAL) for name in ("hdr_uaddr", "hdr_len", "guest_uaddr", "guest_len", "trans_uaddr", "trans_len")),
            ({"guest_len": PAGE + 1}, EINVAL), ({"guest_uaddr": there.hva + 16}, EINVAL), ({"hdr_len": 0x4001}, EINVAL),
            ({"hdr_uaddr": BAD}, EFAULT), ({"trans_uaddr": BAD}, EFAULT), ({"trans_len": 0x4001}, EINVAL),
            ({"guest_uaddr": BAD, "guest_len": 16}, ENOMEM), ({"guest_uaddr": BAD, "guest_len": 16, "trans_uaddr": BAD}, EFAULT),
        ):  # fmt: skip
            assert there.take(sent.header, sent.trans, there.hva, **changes) == (expected, UNTOUCHED), changes
        assert there.take(bytes(HEADER), sent.trans, there.hva) == FIRMWARE["BAD_MEASUREMENT"]
        assert there.take(sent.header, bytes(PAGE), there.hva) == FIRMWARE["BAD_MEASUREMENT"]
        assert there.take(sent.header, sent.trans[:-16], there.hva) == FIRMWARE["BAD_MEASUREMENT"]
        assert there.take(sent.header, sent.trans, there.hva, guest_len=16) == FIRMWARE["INVALID_LEN"]
        with buffer() as memory:
            memory.forbid(0, 1)
            assert there.take(sent.header, sent.trans, memory.address) == (ENOMEM, UNTOUCHED)
        assert there.get(0, 2 * PAGE) == before
        assert there.take(sent.header, sent.trans, there.hva) == (0, 0) and there.contents(PAGE)[:6] == b"travel"


def test_another_machine_cannot_open_it(sent: Traveller) -> None:
    with Traveller(ModelHost()) as there:
        there.to("init")
        assert there.receive(sent.host, sent.session) == FIRMWARE["BAD_MEASUREMENT"] and there.guests == 0


@pytest.mark.parametrize(
    ("number", "states"),
    [
        (sev.KVM_SEV_SEND_FINISH, {"sending"}), (sev.KVM_SEV_SEND_CANCEL, {"sending"}), (sev.KVM_SEV_RECEIVE_FINISH, set()),
        (sev.KVM_SEV_LAUNCH_FINISH, {"measured"}),
    ],
)  # fmt: skip
def test_states(model_host: Any, number: int, states: set[str]) -> None:
    for state in ("started", "measured", "running", "sending"):
        with Sev(model_host) as vm:
            vm.to(state)
            before = vm.state()
            assert vm.op(number) == ((0, 0) if state in states else FIRMWARE["INVALID_GUEST_STATE"])
            assert state in states or vm.state() == before
