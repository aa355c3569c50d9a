"""What KVM and the SEV firmware should answer, as a reference that knows nothing of the model: Linux 7.3's sev.c, statement by statement.

`Reference` keeps the few facts that decide an answer (who is an SEV guest, which /dev/sev it was started with, the guest's state and
policy, who mirrors whom) and predicts one call at a time from the bytes that the caller really passes: `Expect` says the errno, the
firmware codes that are right, and which bytes of the caller may change. The kernel's order of checks is exact, so its errno is one value.
The firmware's order is not known: where a command is wrong in several ways, each of their codes is right.

Predictions change nothing. `Expect.commit` does, after the real call has answered as expected.

    vm.fd     the /dev/sev that KVM stored: 0 until START, copied to a mirror, not taken along by MOVE
    vm.owner  the VM that is mirrored; a context lives as long as its VM or a mirror of it does
"""

from __future__ import annotations

import errno as e
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvmapi.abi import psp
from kvmapi.abi import sev as s

PAGE = 4096
BLOB_MOST = 0x4000
KMALLOC_MOST = 4 << 20
RAM_PAGES = os.sysconf("SC_PHYS_PAGES")
MIRROR_MAY = {s.KVM_SEV_LAUNCH_UPDATE_VMSA, s.KVM_SEV_GUEST_STATUS, s.KVM_SEV_DBG_DECRYPT, s.KVM_SEV_DBG_ENCRYPT}
API = (0, 24)
SENTINEL = 0x5A5A5A5A
"""What the caller leaves in `error`: it stays where the firmware was not reached."""

WRONG_STATE, LENGTH, ADDRESS, CERTIFICATE = 2, psp.SEV_RET_INVALID_LEN, psp.SEV_RET_INVALID_ADDRESS, psp.SEV_RET_INVALID_CERTIFICATE
POLICY, BAD_MAC, BAD_SIGNATURE = psp.SEV_RET_POLICY_FAILURE, psp.SEV_RET_BAD_MEASUREMENT, psp.SEV_RET_BAD_SIGNATURE


class Memory(Protocol):
    """The caller's memory: what may be read and written, and what stands there."""

    def readable(self, address: int, size: int) -> bool: ...
    def writable(self, address: int, size: int) -> bool: ...
    def read(self, address: int, size: int) -> bytes: ...


class Stop(Exception):
    """A check failed: the errno, and with EIO the firmware codes that are right."""

    def __init__(self, errno: int, codes: set[int] | None = None) -> None:
        super().__init__(errno, codes)
        self.errno = errno
        self.codes = codes or set()


@dataclass
class Guest:
    """A guest of the firmware's. `tik` and `tek` are None when nobody but the firmware knows them."""

    handle: int
    policy: int
    state: int
    keys: tuple[bytes, bytes] | None = None  # TEK, TIK
    launched: list[bytes] = field(default_factory=list)  # what was measured
    vmsas: int = 0
    measure: bytes = b""
    stream: object = None  # of the transport keys while sending or receiving
    seen: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)  # block address -> (ciphertext, plaintext)

    def plain(self, address: int, ciphertext: bytes) -> bytes | None:
        """What memory means to the guest, if that is known for each 16-byte block of it."""
        blocks = [self.seen.get(address + at) for at in range(0, len(ciphertext), 16)]
        if any(block is None or block[0] != ciphertext[16 * i : 16 * i + 16] for i, block in enumerate(blocks)):
            return None
        return b"".join(block[1] for block in blocks if block)

    def learn(self, address: int, ciphertext: bytes, plain: bytes) -> None:
        """Under this guest's key, at these addresses, this is that."""
        for at in range(0, len(plain), 16):
            self.seen[address + at] = (ciphertext[at : at + 16], plain[at : at + 16])


@dataclass(eq=False)
class Vm:
    """A VM: its type, and what KVM keeps of SEV in it."""

    type: int
    vcpus: int = 0
    protected: int = 0
    need_init: bool = False
    active: bool = False
    es: bool = False
    fd: int = 0
    guest: Guest | None = None
    owner: Vm | None = None
    mirrors: list[Vm] = field(default_factory=list)
    regions: Counter[tuple[int, int]] = field(default_factory=Counter)
    dead: bool = False
    closed: bool = False

    def __post_init__(self) -> None:
        self.need_init = self.type in (2, 3)

    @property
    def locked(self) -> int:
        """Pages that its regions pin."""
        return sum(covered(*region) * count for region, count in self.regions.items())


@dataclass
class Expect:
    """What a call should answer. `may_change` are the ranges that may differ afterwards; `dispatched`: the command struct is written back.

    `maybe`: firmware codes that are right as well, where success is (no source says which). `acted`: a copy to the caller fails after the
    firmware has acted; the kernel reports EFAULT and cannot take it back, so the guest may be where `acted` puts it, or where it was.
    """

    errno: int = 0
    codes: set[int] = field(default_factory=lambda: {SENTINEL})
    may_change: list[tuple[int, int]] = field(default_factory=list)
    commit: Callable[[], None] = lambda: None
    dispatched: bool = False
    maybe: set[int] = field(default_factory=set)
    acted: Callable[[], None] | None = None


class Reference:
    """All VMs of one platform."""

    def __init__(self, memory: Memory, asids: int, min_sev_asid: int, vmsa_features: int) -> None:
        self.memory = memory
        self.sev_fds: set[int] = set()
        self.vms: list[Vm] = []
        self.uninit = False
        self.features = vmsa_features
        self.locked_most: int | None = None  # RLIMIT_MEMLOCK, in pages
        self.room = {True: min_sev_asid - 1, False: asids - min_sev_asid + 1}

    # ---- the platform
    def guests(self) -> list[Guest]:
        """Guests that the firmware knows: each belongs to a VM that was not moved away and is open, or still mirrored."""
        return [vm.guest for vm in self.vms if vm.guest is not None and vm.owner is None and self.alive(vm)]

    def alive(self, vm: Vm) -> bool:
        return not vm.closed or any(self.alive(mirror) for mirror in vm.mirrors)

    def taken(self, es: bool) -> int:
        """ASIDs of a kind in use: mirrors share their owner's."""
        return sum(vm.active and vm.es == es and vm.owner is None and self.alive(vm) for vm in self.vms)

    # ---- the ioctl
    def operation(
        self, vm: Vm, argument: int, command: Callable[[Reference, Vm, int, int], Expect] | None, words: tuple[int, int, int]
    ) -> Expect:
        """KVM_MEMORY_ENCRYPT_OP. `command` predicts a known id; `words`: id, data, sev_fd of the struct at `argument`."""
        number, data, sev_fd = words
        if vm.dead:
            return Expect(e.EIO)
        if not argument:
            return Expect()
        if not self.memory.readable(argument, 24):
            return Expect(e.EFAULT)
        if vm.owner is not None and number not in MIRROR_MAY:
            return Expect(e.EINVAL)
        if command is None:
            return Expect(e.EINVAL)
        try:
            expect = command(self, vm, data, sev_fd)
        except Stop as stop:
            expect = Expect(stop.errno, stop.codes or {SENTINEL})
        expect.dispatched = True
        expect.may_change.append((argument, 24))  # as far as it can be written
        if not self.memory.writable(argument, 24):
            expect.errno = e.EFAULT
        return expect

    # ---- what the commands are made of
    def sev_guest(self, vm: Vm, otherwise: int = e.ENOTTY) -> None:
        if not vm.active:
            raise Stop(otherwise)

    def struct(self, kind: type[Any], data: int) -> Any:
        """copy_from_user of the command's struct."""
        size = _size(kind)
        if not self.memory.readable(data, size):
            raise Stop(e.EFAULT)
        return kind.from_buffer_copy(self.memory.read(data, size))

    def blob(self, address: int, size: int) -> bytes:
        """psp_copy_user_blob."""
        if not address or not size or size > BLOB_MOST:
            raise Stop(e.EINVAL)
        if not self.memory.readable(address, size):
            raise Stop(e.EFAULT)
        return self.memory.read(address, size)

    def pin(self, vm: Vm, address: int, size: int, write: bool, others: int = 0) -> None:
        """sev_pin_memory, while the command has pinned `others`."""
        if not size or address + size >= 1 << 64 or size // PAGE > RAM_PAGES:
            raise Stop(e.EINVAL)
        if self.locked_most is not None and vm.locked + others + covered(address, size) > self.locked_most:
            raise Stop(e.ENOMEM)
        start, end = address & -PAGE, (address + size + PAGE - 1) & -PAGE
        if not (self.memory.writable if write else self.memory.readable)(start, end - start):
            raise Stop(e.ENOMEM)

    def page(self, vm: Vm, address: int, write: bool, others: int = 0) -> None:
        """sev_pin_page."""
        if address & -PAGE == (1 << 64) - PAGE:
            raise Stop(e.ENOMEM)
        self.pin(vm, address & -PAGE, PAGE, write, others)

    def one_page(self, address: int, size: int) -> None:
        if size > PAGE or address % PAGE + size > PAGE:
            raise Stop(e.EINVAL)

    def issue(self, fd: int) -> None:
        """__sev_issue_cmd: whether the number is /dev/sev at this moment."""
        if fd not in self.sev_fds:
            raise Stop(e.EBADF)

    def stored(self, vm: Vm) -> Guest:
        """sev_issue_cmd of a command for the guest: its fd, and the guest. A VM with an fd has been started."""
        self.issue(vm.fd)
        if vm.guest is None:
            raise Stop(e.EIO, {psp.SEV_RET_INVALID_GUEST})
        return vm.guest

    def query(self, vm: Vm, states: tuple[int, ...], data: int, size: int, back: list[tuple[int, int]]) -> Expect:
        """A command that only asks for a length: it fails, and its struct is written back whatever the failure was."""
        try:
            guest = self.stored(vm)
            expect = Expect(e.EIO, {LENGTH} if guest.state in states else {LENGTH, WRONG_STATE}, back)
        except Stop as stop:
            expect = Expect(stop.errno, stop.codes or {SENTINEL}, back)
        if not self.memory.writable(data, size):
            expect.errno = e.EFAULT
        return expect

    def firmware(self, *wrong: int | bool | set[int]) -> None:
        """(condition, code or codes) in pairs: each that holds makes its codes right, and the command fail."""
        codes: set[int] = set()
        for holds, code in zip(wrong[::2], wrong[1::2]):
            if holds:
                codes |= code if isinstance(code, set) else {int(code)}
        if codes:
            raise Stop(e.EIO, codes)

    # ---- MOVE and COPY
    def share(self, vm: Vm, source: Vm | None, move: bool) -> Expect:
        """KVM_ENABLE_CAP of VM_MOVE_ENC_CONTEXT_FROM or VM_COPY_ENC_CONTEXT_FROM; `source` None: the fd is no VM's."""
        if vm.dead:
            return Expect(e.EIO)
        if source is None:
            return Expect(e.EBADF)
        if source is vm or vm.active or not source.active:
            return Expect(e.EINVAL)
        if not move:
            return Expect(e.EINVAL) if source.owner is not None or vm.vcpus else Expect(commit=lambda: self._copy(vm, source))
        unlike = source.es and (vm.vcpus != source.vcpus or source.protected != source.vcpus)
        if vm.type != source.type or unlike:
            return Expect(e.EINVAL)
        return Expect(commit=lambda: self._move(vm, source))

    def _copy(self, vm: Vm, source: Vm) -> None:
        vm.active, vm.es, vm.fd, vm.guest, vm.owner = True, source.es, source.fd, source.guest, source
        vm.need_init = False
        source.mirrors.append(vm)

    def _move(self, vm: Vm, source: Vm) -> None:
        vm.active, vm.es, vm.guest = True, source.es, source.guest
        vm.protected = source.vcpus if source.es else 0
        vm.regions, vm.mirrors, vm.owner = source.regions, source.mirrors, source.owner
        for mirror in vm.mirrors:
            mirror.owner = vm
        if vm.owner is not None:
            vm.owner.mirrors[vm.owner.mirrors.index(source)] = vm
        source.active = source.es = False
        source.guest, source.owner, source.dead = None, None, True
        source.regions, source.mirrors, source.protected = Counter(), [], 0

    def close(self, vm: Vm) -> None:
        """The last fd of a VM goes."""
        vm.closed = True

    # ---- regions
    def register(self, vm: Vm, argument: int, region: tuple[int, int] | None) -> Expect:
        """KVM_MEMORY_ENCRYPT_REG_REGION of (addr, size); None where the struct cannot be read."""
        if vm.dead:
            return Expect(e.EIO)
        if region is None:
            return Expect(e.EFAULT)
        if not vm.active or vm.owner is not None:
            return Expect(e.EINVAL if vm.active else e.ENOTTY)
        try:
            self.pin(vm, *region, write=False)
        except Stop as stop:
            return Expect(stop.errno)
        return Expect(commit=lambda: vm.regions.update([region]))

    def unregister(self, vm: Vm, argument: int, region: tuple[int, int] | None) -> Expect:
        """KVM_MEMORY_ENCRYPT_UNREG_REGION."""
        if vm.dead:
            return Expect(e.EIO)
        if region is None:
            return Expect(e.EFAULT)
        if vm.owner is not None:
            return Expect(e.EINVAL)
        if not vm.active:
            return Expect(e.ENOTTY)
        return Expect(commit=lambda: vm.regions.subtract([region])) if vm.regions[region] > 0 else Expect(e.EINVAL)


def covered(address: int, size: int) -> int:
    """How many pages [address, address+size) touches."""
    return (address + size - 1) // PAGE - address // PAGE + 1


def pages(address: int, size: int, other: int) -> Iterator[tuple[int, int]]:
    """[0, size) in pieces (offset, length) that stay in one page at `address` and at `other`: how sev_dbg_crypt walks."""
    at = 0
    while at < size:
        length = min(size - at, PAGE - (address + at) % PAGE, PAGE - (other + at) % PAGE)
        yield at, length
        at += length


def _size(kind: type[Any]) -> int:
    import ctypes

    return ctypes.sizeof(kind)
