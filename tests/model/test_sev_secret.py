"""LAUNCH_SECRET through the ioctl: what KVM wants of the three buffers, when the firmware opens a packet, and where it
ends up.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Iterator
from errno import EBADF, EFAULT, EINVAL, ENOMEM
from typing import Any

import pytest

from kvmapi.abi import sev
from kvmapi.session import OwnerSession
from tests.conformance.snippets import PAGE
from tests.model.sev_vm import BAD, FIRMWARE, UNTOUCHED, Sev, at, buffer, change, packet

pytestmark = pytest.mark.model
SECRET = b"0123456789abcdef" * 4


class Owned(Sev):
    """A guest whose owner waits to send a secret."""

    def __init__(self, host: Any, state: str = "measured") -> None:
        super().__init__(host)
        self.owner = OwnerSession.create(self.device.pdh_cert_export()[0], 0)
        assert self.init()[0] == 0
        cert, session = (ctypes.create_string_buffer(blob, len(blob)) for blob in (self.owner.dh_cert, self.owner.session))
        start = sev.kvm_sev_launch_start(0, 0, at(cert), len(cert), 0, at(session), len(session), 0)
        assert self.op(sev.KVM_SEV_LAUNCH_START, start) == (0, 0)
        self.measure_bytes = b""
        if state != "started":
            self.put(0, bytes(48))
            assert self.op(sev.KVM_SEV_LAUNCH_MEASURE, sev.kvm_sev_launch_measure(self.hva, 48)) == (0, 0)
            blob, status = self.get(0, 48), self.device.status()
            version = {"api_major": status.api_major, "api_minor": status.api_minor, "build": status.build}
            assert self.owner.verify(blob[:32], hashlib.sha256().digest(), blob[32:], **version)
            self.measure_bytes = blob[:32]
        if state == "running":
            assert self.finish() == (0, 0)

    def secret(self, header: bytes, trans: bytes, **changes: int) -> tuple[int, int]:
        """LAUNCH_SECRET to the second page, with changes to the struct."""
        head, body = ctypes.create_string_buffer(header, len(header)), ctypes.create_string_buffer(trans, len(trans))
        data = packet(head, len(header), self.hva + PAGE, len(trans), body, len(trans))
        change(data, **changes)
        return self.op(sev.KVM_SEV_LAUNCH_SECRET, data)

    def opened(self, offset: int = 0, size: int = len(SECRET)) -> bytes:
        """What the guest would find in the second page."""
        with buffer() as out:
            assert self.debug(sev.KVM_SEV_DBG_DECRYPT, self.hva + PAGE + offset, out.address, size) == (0, 0)
            return out.memory[:size]


@pytest.fixture
def vm(model_host: Any) -> Iterator[Owned]:
    with Owned(model_host) as made:
        yield made


def test_the_secret_arrives(vm: Owned) -> None:
    before = vm.get(0, 4 * PAGE)
    assert vm.secret(*vm.owner.seal_secret(SECRET, vm.measure_bytes)) == (0, 0)
    after = vm.get(0, 4 * PAGE)
    assert vm.opened() == SECRET and SECRET not in after
    assert after[:PAGE] == before[:PAGE] and after[PAGE + len(SECRET) :] == before[PAGE + len(SECRET) :]
    assert vm.state() == sev.SEV_STATE_LAUNCH_SECRET, "more may follow"


@pytest.mark.parametrize("offset", [16, PAGE - len(SECRET)])
def test_anywhere_in_a_page(vm: Owned, offset: int) -> None:
    assert vm.secret(*vm.owner.seal_secret(SECRET, vm.measure_bytes), guest_uaddr=vm.hva + PAGE + offset) == (0, 0)
    assert vm.opened(offset) == SECRET


def test_buffers(vm: Owned) -> None:
    sealed = vm.owner.seal_secret(SECRET, vm.measure_bytes)
    assert vm.op(sev.KVM_SEV_LAUNCH_SECRET, BAD) == (EFAULT, UNTOUCHED)
    before = vm.get(0, 4 * PAGE)
    for changes, expected in (
        ({"guest_len": 0}, EINVAL),
        ({"guest_uaddr": (1 << 64) - 16}, EINVAL),
        ({"guest_uaddr": BAD}, ENOMEM),
        ({"guest_uaddr": vm.hva + 2 * PAGE - 16}, EINVAL),  # two pages: contiguous nowhere but by chance
        ({"trans_uaddr": 0}, EINVAL), ({"trans_len": 0}, EINVAL), ({"trans_len": 0x4001}, EINVAL), ({"trans_uaddr": BAD}, EFAULT),
        ({"hdr_uaddr": 0}, EINVAL), ({"hdr_len": 0}, EINVAL), ({"hdr_len": 0x4001}, EINVAL), ({"hdr_uaddr": BAD}, EFAULT),
        ({"trans_uaddr": BAD, "hdr_len": 0}, EFAULT),
        ({"guest_uaddr": BAD, "trans_len": 0}, ENOMEM),
    ):  # fmt: skip
        assert vm.secret(*sealed, **changes) == (expected, UNTOUCHED), changes
    assert vm.get(0, 4 * PAGE) == before
    assert vm.secret(*sealed) == (0, 0), "and none of it has spoilt the guest"


def test_the_target_must_be_writable(vm: Owned) -> None:
    sealed = vm.owner.seal_secret(SECRET, vm.measure_bytes)
    with buffer() as memory:
        memory.forbid(0, 1)
        assert vm.secret(*sealed, guest_uaddr=memory.address) == (ENOMEM, UNTOUCHED)


def test_what_the_firmware_refuses(vm: Owned) -> None:
    header, trans = vm.owner.seal_secret(SECRET, vm.measure_bytes)
    before = vm.get(0, 4 * PAGE)
    assert vm.secret(header, trans, guest_uaddr=vm.hva + PAGE + 8) == FIRMWARE["INVALID_ADDRESS"]
    assert vm.secret(header[:51], trans) == vm.secret(header, trans[:-16], guest_len=64) == FIRMWARE["INVALID_LEN"]
    assert vm.secret(header, trans, guest_len=40) == FIRMWARE["INVALID_LEN"]
    for position in range(0, len(header), 7):
        wrong = bytearray(header)
        wrong[position] ^= 1
        assert vm.secret(bytes(wrong), trans) == FIRMWARE["BAD_MEASUREMENT"]
    assert vm.secret(header, bytes(64)) == vm.secret(os.urandom(52), trans) == FIRMWARE["BAD_MEASUREMENT"]
    assert vm.get(0, 4 * PAGE) == before


@pytest.mark.parametrize("state", ["started", "running"])
def test_only_between_measurement_and_finish(model_host: Any, state: str) -> None:
    with Owned(model_host) as right, Owned(model_host, state) as vm:
        sealed = right.owner.seal_secret(SECRET, right.measure_bytes)
        before = vm.get(0, 4 * PAGE)
        assert vm.secret(*sealed) == FIRMWARE["INVALID_GUEST_STATE"] and vm.get(0, 4 * PAGE) == before


def test_another_guests_packet(model_host: Any) -> None:
    with Owned(model_host) as one, Owned(model_host) as two:
        assert two.secret(*one.owner.seal_secret(SECRET, one.measure_bytes)) == FIRMWARE["BAD_MEASUREMENT"]


def test_without_fd(vm: Owned) -> None:
    sealed = vm.owner.seal_secret(SECRET, vm.measure_bytes)
    before = vm.get(0, 4 * PAGE)
    vm.device.close()
    assert vm.secret(*sealed) == (EBADF, UNTOUCHED) and vm.get(0, 4 * PAGE) == before


def test_the_secret_is_nowhere_in_the_caller(vm: Owned) -> None:
    secret = os.urandom(48)
    assert vm.secret(*vm.owner.seal_secret(secret, vm.measure_bytes)) == (0, 0)
    assert secret not in vm.memory[:] and vm.opened(0, 48) == secret
