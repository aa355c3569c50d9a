"""Random SEV commands of several VMs on one ModelHost, each compared with the reference: the errno, the firmware's code, the memory.

`World` has one method per thing that a VMM can do. Each takes small numbers, which it turns into the struct of a call that is right, and a
`Twist`, which makes one field of it wrong; what should come of it is the reference's to say, from the bytes that are really passed. After
each call every guest's GUEST_STATUS and the PLATFORM_STATUS are those of the reference. `close` ends everything and counts ASIDs and fds.

Two callers: tests/model/test_sev_properties.py (short, finds the shortest failing sequence) and `scripts/fuzz sev` (long).
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
from typing import Any

from kvmapi.abi import ioctls, psp, structs
from kvmapi.abi import sev as s
from kvmapi.model.host import ModelHost
from kvmapi.model.platform import Platform
from tests.model.sev_arena import GUEST, PAGE, Arena
from tests.model.sev_invariants import Invariants, Violated
from tests.model.sev_owner import Owner
from tests.model.sev_reference import SENTINEL, Expect, Reference, Vm
from tests.model.sev_reference_migration import Road
from tests.model.sev_twist import DATA, STRAIGHT, Twist, elsewhere, place

ASIDS, MIN_SEV_ASID, MOST_VMS, MOST_VCPUS = 5, 3, 5, 3
COMMAND, BLOBS, OUTPUT, SECOND = 0, 0x1000, 0xC000, 0x12000  # in scratch
POLICIES = (0, 1, 4, 5, 8, 0x20, 0x10, 0x24, 0x2C, 2, 0x1800_0000, 0x1900_0000, 0x0001_0004)
ANY = -1


class Broken(AssertionError):
    """The model and the reference disagree; the text says about what."""


class World:
    """One platform, its VMs, and the reference beside them."""

    def __init__(self, platform: Platform | None = None) -> None:
        self.host = ModelHost(platform or Platform(asids=ASIDS, min_sev_asid=MIN_SEV_ASID))
        self.arena = Arena(MOST_VMS)
        self.kvm = self.host.open("/dev/kvm", os.O_RDWR)
        self.control = self.host.open("/dev/sev", os.O_RDWR)
        self.ref = Reference(self.arena, ASIDS, MIN_SEV_ASID, self.host.platform.vmsa_features)
        self.sev_fds = [self.host.open("/dev/sev", os.O_RDWR) for _ in range(2)]
        self.ref.sev_fds |= {*self.sev_fds, self.control}
        self.fds: dict[Vm, int] = {}
        self.vcpus: dict[Vm, list[int]] = {}
        self.places: dict[Vm, int] = {}
        self.owner, self.road = Owner(), Road(b"", b"", b"")
        self._learn_platform()
        self.invariants = Invariants()
        self.steps = self.good = 0
        self.last = ""
        self.answers: dict[str, int] = {}

    # ---- what the rules choose from
    @property
    def open_vms(self) -> list[Vm]:
        return list(self.fds)

    def vm(self, number: int) -> Vm:
        return self.open_vms[number % len(self.fds)]

    def suited(self, number: int, state: int) -> int:
        """The number of a VM: for an even `number` one whose guest is in this state (or, for `ANY`, an SEV guest), if there is one."""
        found = [at for at, vm in enumerate(self.fds) if vm.active and state in (ANY, vm.guest.state if vm.guest is not None else None)]
        return found[number // 2 % len(found)] if found and number % 2 == 0 else number

    def sev_fd(self, number: int) -> int:
        """Mostly an open /dev/sev; sometimes a closed one, a VM, or none."""
        choice = number % 16
        others = {13: self.kvm, 14: 0xFFFF_FFFF, 15: 987_654}
        return others.get(choice) or (self.sev_fds[choice % len(self.sev_fds)] if self.sev_fds else self.control)

    # ---- the platform
    def platform(self, command: int, data: Any = None) -> tuple[int, int]:
        """(errno, error) of SEV_ISSUE_CMD."""
        argument = psp.sev_issue_cmd(command, 0 if data is None else ctypes.addressof(data), SENTINEL)
        answer = self.host.ioctl(self.control, psp.SEV_ISSUE_CMD, ctypes.addressof(argument))
        return -answer, argument.error

    def _learn_platform(self) -> None:
        """The owner, and a platform that sends, learn the certificates of the PDH as it is now."""
        lengths = psp.sev_user_data_pdh_cert_export()
        self.platform(psp.SEV_PDH_CERT_EXPORT, lengths)
        pdh, chain = ctypes.create_string_buffer(lengths.pdh_cert_len), ctypes.create_string_buffer(lengths.cert_chain_len)
        data = psp.sev_user_data_pdh_cert_export(ctypes.addressof(pdh), len(pdh), ctypes.addressof(chain), len(chain))
        if (answer := self.platform(psp.SEV_PDH_CERT_EXPORT, data)) != (0, 0):
            raise Broken(f"PDH_CERT_EXPORT: {answer}")
        self.owner.learn(pdh.raw)
        self.road.pdh, self.road.chain = pdh.raw, chain.raw
        self.road.amd = self.host.platform.firmware.identity.amd_certificates

    def new_keys(self, what: int) -> None:
        """PDH_GEN, PEK_GEN or FACTORY_RESET: sessions that were made before are worthless."""
        command = (psp.SEV_PDH_GEN, psp.SEV_PEK_GEN, psp.SEV_FACTORY_RESET)[what % 3]
        answer = self.platform(command)
        working = bool(self.ref.guests())
        self.last = f"/dev/sev command {command} while {len(self.ref.guests())} guests exist: {answer}"
        if command == psp.SEV_FACTORY_RESET:
            right = answer[0] == errno.EBUSY if working else answer == (0, 0)
        elif command == psp.SEV_PEK_GEN and working:
            right = answer == (errno.EIO, psp.SEV_RET_INVALID_PLATFORM_STATE)
        else:
            right = answer == (0, 0)
        if not right:
            raise Broken(self.last)
        if not answer[0]:
            self.ref.uninit |= command == psp.SEV_FACTORY_RESET
            self.road.sessions.clear()
            self._learn_platform()
        self.check()

    def sev_device(self, number: int, close: bool) -> None:
        """Close one of the /dev/sev that guests were started with, or open another."""
        if close and self.sev_fds:
            fd = self.sev_fds.pop(number % len(self.sev_fds))
            self.host.close(fd)
            self.ref.sev_fds.discard(fd)
        elif len(self.sev_fds) < 3:
            fd = self.host.open("/dev/sev", os.O_RDWR)
            self.sev_fds.append(fd)
            self.ref.sev_fds.add(fd)

    def limit(self, pages: int | None) -> None:
        """RLIMIT_MEMLOCK of the caller, from now on."""
        self.host.memlock_limit = lambda: None if pages is None else pages * PAGE  # type: ignore[method-assign]
        self.ref.locked_most = pages

    # ---- VMs
    def create_vm(self, type: int) -> None:
        """KVM_CREATE_VM; no more than there are guest areas."""
        free = sorted(set(range(MOST_VMS)) - set(self.places.values()))
        if not free:
            return
        fd = self.host.ioctl(self.kvm, ioctls.KVM_CREATE_VM, type)
        if fd < 0:
            raise Broken(f"KVM_CREATE_VM({type}): {fd}")
        vm = Vm(type)
        self.ref.vms.append(vm)
        self.fds[vm], self.places[vm], self.vcpus[vm] = fd, free[0], []

    def close_vm(self, vm: Vm) -> None:
        """Close its fds; what the firmware keeps of it is the reference's to say."""
        for fd in (*self.vcpus.pop(vm), self.fds.pop(vm)):
            self.host.close(fd)
        del self.places[vm]
        self.ref.close(vm)
        self.ref.vms = [other for other in self.ref.vms if self.ref.alive(other)]
        self.last = "close of a VM"
        self.check()

    def create_vcpu(self, vm: Vm) -> None:
        """KVM_CREATE_VCPU."""
        if vm.vcpus >= MOST_VCPUS:
            return
        fd = self.host.ioctl(self.fds[vm], ioctls.KVM_CREATE_VCPU, vm.vcpus)
        if (fd if fd < 0 else 0) != (-errno.EIO if vm.dead else 0):
            raise Broken(f"KVM_CREATE_VCPU: {fd}, dead {vm.dead}")
        if fd >= 0:
            vm.vcpus += 1
            self.vcpus[vm].append(fd)

    def run(self, vm: Vm) -> None:
        """KVM_RUN where nothing may run: a dead VM, or one of an SEV type that did not run INIT2 (or took its context by MOVE)."""
        wanted = errno.EIO if vm.dead else errno.EINVAL
        if self.vcpus[vm] and (vm.dead or vm.need_init):
            answer = self.host.ioctl(self.vcpus[vm][0], ioctls.KVM_RUN, 0)
            if answer != -wanted:
                raise Broken(f"KVM_RUN of {vm}: {answer}, not {-wanted}")

    def share(self, vm: Vm, source: Vm | None, move: bool, number: int = 0) -> None:
        """MOVE or COPY of the encryption context."""
        fd = self.fds[source] if source is not None else self.sev_fd(12 + number % 4)
        cap = structs.kvm_enable_cap(cap=206 if move else 197, args=(ctypes.c_uint64 * 4)(fd))
        expect = self.ref.share(vm, source, move)
        answer = self.host.ioctl(self.fds[vm], ioctls.KVM_ENABLE_CAP, ctypes.addressof(cap))
        self._judge(f"{'MOVE' if move else 'COPY'} into {vm} from {source}", expect, answer)

    def region(self, vm: Vm, page: int, size: int, register: bool, twist: Twist = STRAIGHT) -> None:
        """REG_REGION and UNREG_REGION."""
        region = structs.kvm_enc_region(self.arena.guest[self.places[vm]] + page % 4 * PAGE, size)
        address = place(self.arena, region, twist)
        given = (region.addr, region.size) if self.arena.readable(address, 16) else None
        if given and address != self.arena.scratch + DATA:
            given = struct_pair(self.arena.read(address, 16))
        if given and register and self._hole_inside(*given):
            return
        expect = (self.ref.register if register else self.ref.unregister)(vm, address, given)
        number = ioctls.KVM_MEMORY_ENCRYPT_REG_REGION if register else ioctls.KVM_MEMORY_ENCRYPT_UNREG_REGION
        self._judge(f"region {register} {given}", expect, self.host.ioctl(self.fds[vm], number, address))

    def _hole_inside(self, address: int, size: int) -> bool:
        """Both ends could be pinned and something between them not: the model looks there for unmapped pages, not for PROT_NONE."""
        ends = self.arena.readable(address & -PAGE, PAGE) and self.arena.readable(address + size - 1 & -PAGE, PAGE)
        return ends and not self.arena.readable(address, size)

    # ---- KVM_MEMORY_ENCRYPT_OP
    def command(self, vm: Vm, number: int, data: Any = None, twist: Twist = STRAIGHT, sev_fd: int = 0) -> Expect:
        """One command. `twist` 1 moves the command struct, 2 the command's struct, 3.. change fields of the latter."""
        arena = self.arena
        at = arena.scratch + COMMAND
        where = arena.scratch + DATA
        if data is not None:
            where = place(arena, data, twist)
        pad = 0xDEAD_0000 | self.steps & 0xFFFF
        given = s.kvm_sev_cmd(number, pad, where, SENTINEL, sev_fd)
        arena.write(at, bytes(given))
        if twist.field == 1:
            at = elsewhere(arena, at)[twist.value]
            if arena.writable(at, 24):
                arena.write(at, bytes(given))
            elif arena.readable(at, 24):
                given = s.kvm_sev_cmd.from_buffer_copy(arena.read(at, 24))
        commands = self.road.commands(self.owner.judge)
        words = (given.id, given.data, given.sev_fd)
        expect = self.ref.operation(vm, at, commands.get(given.id), words)
        name = s.COMMAND_NAMES.get(given.id, str(given.id))
        before = arena.snapshot()
        answer = self.host.ioctl(self.fds[vm], ioctls.KVM_MEMORY_ENCRYPT_OP, at)
        now = s.kvm_sev_cmd.from_buffer_copy(arena.read(at, 24)) if arena.readable(at, 24) else given
        said = f"{name}({_words(data)}) of {vm.type=} {vm.es=} state {vm.guest.state if vm.guest else None}: {answer}, error {now.error:#x}"
        if expect.maybe and answer == -errno.EIO and now.error in expect.maybe:
            expect = Expect(errno.EIO, expect.maybe, expect.may_change, dispatched=True)
        if (now.id, now.pad0, now.data, now.sev_fd) != (given.id, given.pad0, given.data, given.sev_fd):
            raise Broken(f"{said}: the command struct was changed")
        if arena.writable(at, 24) and now.error not in (expect.codes if expect.dispatched else {SENTINEL}):
            raise Broken(f"{said}: error should be of {sorted(expect.codes)}, errno {expect.errno}")
        if vm.guest is not None:
            try:
                self.invariants.saw(given.id, not answer and at != 0, vm.guest.handle, vm.guest.policy)
            except Violated as wrong:
                raise Broken(f"{said}: {wrong}") from wrong
        self._judge(said, expect, answer, before, vm)
        return expect

    def _judge(self, said: str, expect: Expect, answer: int, before: list[bytes] | None = None, vm: Vm | None = None) -> None:
        self.steps += 1
        self.last = said
        name = said.partition("(")[0].partition(" ")[0]
        key = f"{name} {errno.errorcode.get(-answer, answer)}"
        self.answers[key] = self.answers.get(key, 0) + 1
        if answer != -expect.errno:
            raise Broken(f"{said}: answered {answer}, should be {errno.errorcode.get(expect.errno, 0)} with one of {sorted(expect.codes)}")
        if before is not None and (pages := self.arena.changed(before, expect.may_change)):
            raise Broken(f"{said}: changed memory at {[hex(page - self.arena.base) for page in pages]}")
        if not answer:
            self.good += 1
            try:
                expect.commit()
            except AssertionError as wrong:
                raise Broken(f"{said}: {wrong}") from wrong
        elif expect.acted is not None and vm is not None and vm.guest is not None and self._state(vm) != vm.guest.state:
            expect.acted()
        self.check()

    def _state(self, vm: Vm) -> int:
        status = s.kvm_sev_guest_status()
        command = s.kvm_sev_cmd(s.KVM_SEV_GUEST_STATUS, 0, ctypes.addressof(status), SENTINEL, 0)
        answer = self.host.ioctl(self.fds[vm], ioctls.KVM_MEMORY_ENCRYPT_OP, ctypes.addressof(command))
        if answer or command.error:
            raise Broken(f"after {self.last}: GUEST_STATUS of {vm}: {answer}, error {command.error:#x}")
        guest = vm.guest
        if guest is None or (status.handle, status.policy) != (guest.handle, guest.policy):
            raise Broken(f"after {self.last}: GUEST_STATUS is {status.handle}, {status.policy:#x}, not {guest}")
        return int(status.state)

    def check(self) -> None:
        """Every guest that can be asked is in the reference's state, and the platform counts as the reference does."""
        for vm in self.fds:
            if vm.active and vm.guest is not None and vm.fd in self.ref.sev_fds and not vm.dead and self._state(vm) != vm.guest.state:
                raise Broken(f"after {self.last}: state {self._state(vm)}, not {vm.guest.state}")
        guests = self.ref.guests()
        status = psp.sev_user_data_status()
        self.platform(psp.SEV_PLATFORM_STATUS, status)
        state = psp.SEV_PLATFORM_UNINIT if self.ref.uninit else psp.SEV_PLATFORM_WORKING if guests else psp.SEV_PLATFORM_INIT
        if (status.guest_count, status.state) != (len(guests), state):
            raise Broken(f"after {self.last}: {status.guest_count} guests, platform {status.state}; should be {len(guests)}, {state}")

    # ---- memory for structs
    def blob(self, slot: int, data: bytes) -> int:
        """The address of a copy in scratch; up to three at a time, each with room for 16 KiB behind it."""
        address = self.arena.scratch + BLOBS + slot * 0x1000
        self.arena.write(address, data)
        return address

    def output(self, second: bool = False) -> int:
        """The address of a buffer of 16 KiB, filled with nothing that an answer could be."""
        address = self.arena.scratch + (SECOND if second else OUTPUT)
        ctypes.memset(address, 0xEE, 0x4000 if not second else 0x4001)
        return address

    def guest_bytes(self, vm: Vm, at: int, size: int, seed: int) -> int:
        """The address of fresh plaintext in the VM's memory."""
        address = self.arena.guest[self.places[vm]] + at % GUEST
        size = min(size, GUEST - at % GUEST)
        self.arena.write(address, hashlib.shake_128(f"{seed} {self.steps}".encode()).digest(size))
        return address

    # ---- the end
    def close(self) -> None:
        """Close everything: no guest is left, and every ASID of both kinds can be had again."""
        for vm in self.open_vms:
            self.close_vm(vm)
        if self.ref.guests():
            raise Broken("the reference thinks that guests are left")
        for type, room in ((2, self.ref.room[False]), (3, self.ref.room[True])):
            answers = []
            for _ in range(room + 1):
                self.create_vm(type)
                answers.append(self.command(self.open_vms[-1], s.KVM_SEV_INIT2, s.kvm_sev_init()).errno)
            if answers != [0] * room + [errno.EBUSY]:
                raise Broken(f"ASIDs for type {type}: {answers}")
            for vm in self.open_vms:
                self.close_vm(vm)
        self.dispose()

    def dispose(self) -> None:
        """Close every fd without a look at what is left."""
        for fd in (*(fd for fds in self.vcpus.values() for fd in fds), *self.fds.values(), *self.sev_fds, self.control, self.kvm):
            self.host.close(fd)
        self.vcpus, self.fds, self.sev_fds = {}, {}, []
        self.arena.close()


def struct_pair(data: bytes) -> tuple[int, int]:
    return int.from_bytes(data[:8], "little"), int.from_bytes(data[8:16], "little")


def _words(data: Any) -> str:
    from kvmapi.rows import decode_struct

    return (
        ""
        if data is None
        else ", ".join(f"{key}={value:#x}" if isinstance(value, int) else key for key, value in decode_struct(data).items())
    )
