"""The chain of a launch on a small stand-in for KVM and firmware: order, states, and what is read back."""

from __future__ import annotations

import ctypes
import mmap
import os
from errno import EINVAL, EIO, ENOTTY
from typing import Any

import pytest

from kvmapi.abi import ioctls, psp
from kvmapi.abi import sev as s
from kvmapi.errors import KvmError, LaunchOrderError, LaunchStateError
from kvmapi.launch import Launch, Measured, Running, Started
from kvmapi.sev import SevPlatform
from kvmapi.vm import Vm

BLOB = bytes(range(48))


class ToyHost:
    """Knows SEV commands and /dev/sev just enough; `log` is what was asked, `state` the guest's."""

    name = "toy"

    def __init__(self) -> None:
        self.log: list[str] = []
        self.state = s.SEV_STATE_UNINIT
        self.policy = 0
        self.lie: dict[str, int] = {}
        self.seen: dict[str, bytes] = {}

    def open(self, path: str, flags: int) -> int:
        return os.open("/dev/null", os.O_RDONLY)

    def close(self, fd: int) -> None:
        os.close(fd)

    def mmap(self, *args: Any, **kwargs: Any) -> mmap.mmap:
        raise OSError(EINVAL, "not here")

    memfd_create = fallocate = mmap

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        if request == psp.SEV_ISSUE_CMD:
            return self._platform(psp.sev_issue_cmd.from_address(arg))
        if request != ioctls.KVM_MEMORY_ENCRYPT_OP:
            return -ENOTTY
        command = s.kvm_sev_cmd.from_address(arg)
        name = s.COMMAND_NAMES[command.id].removeprefix("KVM_SEV_")
        self.log.append(name)
        handler = getattr(self, f"_{name.lower()}", None)
        status = handler(command) if handler else 0
        if status:
            command.error = status
            return -EIO
        return 0

    def _platform(self, command: psp.sev_issue_cmd) -> int:
        if command.cmd == psp.SEV_PLATFORM_STATUS:
            psp.sev_user_data_status.from_address(command.data).api_minor = 24
            return 0
        data = psp.sev_user_data_pdh_cert_export.from_address(command.data)
        if data.pdh_cert_len == 0:
            data.pdh_cert_len, data.cert_chain_len, command.error = 2084, 3 * 2084, psp.SEV_RET_INVALID_LEN
            return -EIO
        ctypes.memset(data.pdh_cert_address, 0x11, 2084)
        ctypes.memset(data.cert_chain_address, 0x22, 3 * 2084)
        return 0

    def _launch_start(self, command: s.kvm_sev_cmd) -> int:
        data = s.kvm_sev_launch_start.from_address(command.data)
        for name in ("dh", "session"):
            self.seen[name] = ctypes.string_at(getattr(data, f"{name}_uaddr"), getattr(data, f"{name}_len"))
        data.handle, self.policy, self.state = 7, data.policy, s.SEV_STATE_LAUNCH_UPDATE
        return 0

    def _launch_measure(self, command: s.kvm_sev_cmd) -> int:
        data = s.kvm_sev_launch_measure.from_address(command.data)
        if data.len == 0:
            data.len = self.lie.get("len", 48)
            return psp.SEV_RET_INVALID_LEN
        ctypes.memmove(data.uaddr, BLOB, 48)
        self.state = s.SEV_STATE_LAUNCH_SECRET
        return 0

    def _launch_secret(self, command: s.kvm_sev_cmd) -> int:
        data = s.kvm_sev_launch_secret.from_address(command.data)
        self.seen["secret"] = ctypes.string_at(data.trans_uaddr, data.trans_len)
        assert (data.hdr_len, data.guest_len) == (52, 32)
        return psp.SEV_RET_BAD_MEASUREMENT if "secret" in self.lie else 0

    def _launch_finish(self, command: s.kvm_sev_cmd) -> int:
        self.state = s.SEV_STATE_RUNNING
        return 0

    def _guest_status(self, command: s.kvm_sev_cmd) -> int:
        data = s.kvm_sev_guest_status.from_address(command.data)
        data.handle = self.lie.get("handle", 7)
        data.policy = self.lie.get("policy", self.policy)
        data.state = self.lie.get("state", self.state)
        return 0


@pytest.fixture
def host() -> ToyHost:
    return ToyHost()


@pytest.fixture
def launch(host: ToyHost) -> Launch:
    return Launch(Vm(host, host.open("", 0), 3, 0), SevPlatform(host))


def test_a_whole_launch(host: ToyHost, launch: Launch) -> None:
    started = launch.init2().start(5, b"certificate", b"session")
    assert isinstance(started, Started) and (started.handle, started.policy) == (7, 5)
    started.update_data(0x1000, 0x1000)
    started.update_vmsa()
    measured = started.measure()
    assert isinstance(measured, Measured)
    assert (measured.measure, measured.nonce) == (BLOB[:32], BLOB[32:])
    measured.secret(bytes(52), b"c" * 32, 0x2000)
    running = measured.finish()
    assert isinstance(running, Running) and running.status().state_name == "RUNNING"
    assert host.seen == {"dh": b"certificate", "session": b"session", "secret": b"c" * 32}
    assert host.log == [
        "INIT2", "LAUNCH_START", "GUEST_STATUS", "LAUNCH_UPDATE_DATA", "LAUNCH_UPDATE_VMSA", "LAUNCH_MEASURE",
        "LAUNCH_MEASURE", "GUEST_STATUS", "LAUNCH_SECRET", "LAUNCH_FINISH", "GUEST_STATUS", "GUEST_STATUS",
    ]  # fmt: skip


def test_a_past_step_cannot_be_taken_again(host: ToyHost, launch: Launch) -> None:
    started = launch.start(0)
    with pytest.raises(LaunchOrderError, match=r"LAUNCH_START: .* from Launch"):
        launch.start(0)
    with pytest.raises(LaunchOrderError):
        launch.init2()
    measured = started.measure()
    for step in (lambda: started.update_data(0, 16), started.update_vmsa, started.measure):
        with pytest.raises(LaunchOrderError, match="from Started"):
            step()
    measured.finish()
    for step in (lambda: measured.secret(bytes(52), b"", 0), measured.finish):
        with pytest.raises(LaunchOrderError, match="from Measured"):
            step()
    assert host.log.count("LAUNCH_START") == host.log.count("LAUNCH_FINISH") == 1
    assert "(past)" in repr(started)


@pytest.mark.parametrize(("field", "value"), [("handle", 8), ("policy", 1), ("state", s.SEV_STATE_RUNNING)])
def test_what_is_read_back_must_agree(host: ToyHost, launch: Launch, field: str, value: int) -> None:
    host.lie[field] = value
    with pytest.raises(LaunchStateError, match="LAUNCH_UPDATE"):
        launch.start(0)


def test_a_failing_step_leaves_the_launch_where_it_was(host: ToyHost, launch: Launch) -> None:
    measured = launch.start(0).measure()
    host.lie["secret"] = 1
    with pytest.raises(KvmError, match="BAD_MEASUREMENT") as caught:
        measured.secret(bytes(52), b"c" * 32, 0x2000)
    assert caught.value.fw_error == psp.SEV_RET_BAD_MEASUREMENT and caught.value.ioctl == "KVM_SEV_LAUNCH_SECRET"
    host.lie.clear()
    measured.secret(bytes(52), b"c" * 32, 0x2000)
    measured.finish()


def test_an_odd_length_is_refused(host: ToyHost, launch: Launch) -> None:
    host.lie["len"] = 1 << 30
    with pytest.raises(LaunchStateError, match="1073741824 bytes"):
        launch.start(0).measure()
    with pytest.raises(ValueError, match="52 bytes"):
        Measured(launch.vm, 0, 7, b"", b"").secret(b"short", b"", 0)


def test_platform(host: ToyHost) -> None:
    with SevPlatform(host) as platform:
        status = platform.status()
        assert (status.api_minor, status.state_name, status.es, status.owned) == (24, "UNINIT", False, False)
        pdh, chain = platform.pdh_cert_export()
        assert pdh == b"\x11" * 2084 and chain == b"\x22" * 6252
