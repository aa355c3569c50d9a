"""Test support: SEV commands as raw numbers, on VMs of the model.

A command's outcome is (errno, `error` afterwards). KVM's own failures leave `error` as it was, here UNTOUCHED; the firmware's are
EIO with its status; a command that the firmware did leaves 0.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from kvmapi.abi import caps, ioctls, psp, sev
from kvmapi.abi.structs import kvm_enable_cap, kvm_enc_region
from kvmapi.sev import SevPlatform
from tests.conformance.snippets import PAGE, Machine, address_of, protect

UNTOUCHED = 0x5A5A5A5A
BAD = 8  # nothing is mapped there
STATES = ("fresh", "init", "started", "measured", "running", "sending")
EIO = 5


def at(data: Any) -> int:
    """Its address; a number is one already."""
    return data if isinstance(data, int) else 0 if data is None else ctypes.addressof(data)


def change(data: ctypes.Structure, **changes: int) -> None:
    """Set fields of a struct."""
    for name, value in changes.items():
        assert hasattr(data, name)
        setattr(data, name, value)


def packet(header: Any, header_size: int, address: int, size: int, trans: Any, trans_size: int) -> sev.kvm_sev_launch_secret:
    """The struct that LAUNCH_SECRET, SEND_UPDATE_DATA and RECEIVE_UPDATE_DATA share."""
    return sev.kvm_sev_launch_secret(at(header), header_size, 0, address, size, 0, at(trans), trans_size, 0)


class Sev(Machine):
    """A VM of a given type with /dev/sev at hand. Types: 0 (legacy INIT), 2 SEV, 3 SEV-ES."""

    def __init__(self, host: Any, type: int = 2, **machine: Any) -> None:
        super().__init__(host, type, **machine)
        self.type = type
        self.device = SevPlatform(host)
        self.closing.append(self.device)

    def op(self, number: int, data: Any = None, fd: int | None = None) -> tuple[int, int]:
        """(errno, `error` afterwards)."""
        address = at(data)
        command = sev.kvm_sev_cmd(id=number, data=address, error=UNTOUCHED, sev_fd=self.device.fd if fd is None else fd)
        result = self.vm.ioctl_raw(ioctls.KVM_MEMORY_ENCRYPT_OP, ctypes.addressof(command))
        assert (command.id, command.data) == (number, address)
        return -result if result < 0 else result, command.error

    def init(self, es: bool = False) -> tuple[int, int]:
        """As the type wants it; `es` for the legacy way."""
        if self.type == 0:
            return self.op(sev.KVM_SEV_ES_INIT if es else sev.KVM_SEV_INIT)
        return self.op(sev.KVM_SEV_INIT2, sev.kvm_sev_init())

    def start(self, policy: int | None = None) -> tuple[int, int]:
        policy = (sev.SEV_POLICY_ES if self.type == 3 else 0) if policy is None else policy
        return self.op(sev.KVM_SEV_LAUNCH_START, sev.kvm_sev_launch_start(policy=policy))

    def to(self, state: str, policy: int | None = None) -> None:
        """Bring a fresh VM's guest to a state."""
        wanted = STATES.index(state)
        if wanted >= 1:
            assert self.init()[0] == 0
        if wanted >= 2:
            assert self.start(policy) == (0, 0)
        if wanted >= 3:
            assert self.measure() == (0, 0)
        if wanted >= 4:
            assert self.finish() == (0, 0)
        if wanted >= 5:
            assert self.send_start()[0] == (0, 0)

    def measure(self) -> tuple[int, int]:
        blob = ctypes.create_string_buffer(48)
        return self.op(sev.KVM_SEV_LAUNCH_MEASURE, sev.kvm_sev_launch_measure(at(blob), 48))

    def update(self, address: int | None = None, size: int = PAGE) -> tuple[int, int]:
        address = self.hva if address is None else address
        return self.op(sev.KVM_SEV_LAUNCH_UPDATE_DATA, sev.kvm_sev_launch_update_data(address, size))

    def finish(self) -> tuple[int, int]:
        return self.op(sev.KVM_SEV_LAUNCH_FINISH)

    def status(self) -> tuple[int, int, int]:
        """Handle, policy, state."""
        data = sev.kvm_sev_guest_status()
        assert self.op(sev.KVM_SEV_GUEST_STATUS, data) == (0, 0)
        return data.handle, data.policy, data.state

    def state(self) -> int:
        return self.status()[2]

    def debug(self, number: int, source: int, target: int, size: int) -> tuple[int, int]:
        """DBG_DECRYPT or DBG_ENCRYPT."""
        return self.op(number, sev.kvm_sev_dbg(source, target, size))

    def send_start(self, **changes: int) -> tuple[tuple[int, int], sev.kvm_sev_send_start, bytes]:
        """SEND_START to this very platform: outcome, struct afterwards, session."""
        blobs = self.blobs = peer(self.host)
        session = ctypes.create_string_buffer(changes.get("session_len", 128) or 1)
        data = sev.kvm_sev_send_start(policy=0x77, session_uaddr=at(session), session_len=128)
        for name, blob in zip(("pdh_cert", "plat_certs", "amd_certs"), blobs):
            change(data, **{f"{name}_uaddr": at(blob), f"{name}_len": len(blob)})
        change(data, **changes)
        return self.op(sev.KVM_SEV_SEND_START, data), data, session.raw

    def region(self, address: int, size: int, *, undo: bool = False) -> int:
        """REG_REGION or UNREG_REGION: the errno."""
        request = ioctls.KVM_MEMORY_ENCRYPT_UNREG_REGION if undo else ioctls.KVM_MEMORY_ENCRYPT_REG_REGION
        argument = kvm_enc_region(address, size)
        return -self.vm.ioctl_raw(request, ctypes.addressof(argument))

    def share(self, cap: int, source: int) -> int:
        """COPY or MOVE from the VM fd `source`: the errno."""
        argument = kvm_enable_cap(cap=cap)
        argument.args[0] = source
        return -self.vm.ioctl_raw(ioctls.KVM_ENABLE_CAP, ctypes.addressof(argument))

    def copy(self, source: Sev) -> int:
        """Become a mirror of `source`: the errno."""
        return self.share(caps.KVM_CAP_VM_COPY_ENC_CONTEXT_FROM, source.vm.fd)

    def move(self, source: Sev) -> int:
        """Take the place of `source`: the errno."""
        return self.share(caps.KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM, source.vm.fd)

    @property
    def guests(self) -> int:
        """How many guests the firmware has."""
        return self.device.status().guest_count


VCPUS = 4  # of a guest that `Family` makes


class Family:
    """VMs of type 0 of one machine, made as the kernel's tests make them."""

    def __init__(self, host: Any) -> None:
        self.host = host
        self.all = ExitStack()

    def aux(self, vcpus: int = 0, type: int = 0) -> Sev:
        """A VM that is no guest."""
        vm = self.all.enter_context(Sev(self.host, type))
        for _ in range(vcpus):
            vm.add_vcpu()
        return vm

    def guest(self, es: bool = False, vcpus: int = VCPUS, vmsa: bool = True) -> Sev:
        """A started guest with memory, and with its VMSAs measured."""
        vm = self.aux()
        assert vm.init(es)[0] == 0
        for _ in range(vcpus):
            vm.add_vcpu()
        assert vm.start(sev.SEV_POLICY_ES if es else 0) == (0, 0) and vm.update() == (0, 0)
        if es and vmsa:
            assert vm.op(sev.KVM_SEV_LAUNCH_UPDATE_VMSA) == (0, 0)
        return vm

    @property
    def firmware(self) -> Any:
        return self.host.platform.firmware


def close(vm: Sev) -> None:
    """Close a VM altogether, as a test does that frees it."""
    vm.__exit__()


def peer(host: Any) -> list[Any]:
    """PDH, platform chain and AMD chain of the host's own firmware, as SEND_START wants them of a destination."""
    identity = host.platform.firmware.identity
    chains = (identity.pdh_certificate, identity.chain, identity.amd_certificates)
    return [(ctypes.c_ubyte * len(blob)).from_buffer_copy(blob) for blob in chains]


class Buffer:
    """Pages of ordinary memory, with or without access."""

    def __init__(self, pages: int) -> None:
        self.memory = mmap.mmap(-1, pages * PAGE)
        self.address = address_of(self.memory)
        self.size = pages * PAGE

    def forbid(self, page: int, prot: int = 0) -> int:
        """Take access from one page (PROT_NONE, or PROT_READ = 1); its address."""
        protect(self.address + page * PAGE, PAGE, prot)
        return self.address + page * PAGE

    def fill(self, data: bytes, offset: int = 0) -> int:
        """Store; the address."""
        self.memory[offset : offset + len(data)] = data
        return self.address + offset

    def close(self) -> None:
        protect(self.address, self.size, 3)
        self.memory.close()


@contextmanager
def buffer(pages: int = 1) -> Iterator[Buffer]:
    """Such pages for one test."""
    made = Buffer(pages)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def sev_at_fd_zero(host: Any) -> Iterator[None]:
    """Inside, this process's fd 0 is /dev/sev."""
    saved = os.dup(0)
    os.close(0)
    try:
        assert host.open("/dev/sev", os.O_RDWR) == 0
        yield
        host.close(0)
    finally:
        os.dup2(saved, 0)
        os.close(saved)


FIRMWARE = {name: (EIO, getattr(psp, f"SEV_RET_{name}")) for name in psp.RET_NAMES.values() if hasattr(psp, f"SEV_RET_{name}")}
"""Outcome of a command that the firmware refused, by the status's name."""
