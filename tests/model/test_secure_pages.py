"""The invariant: plaintext of a private page is seen by the private access of its guest and by nobody else; an access that
disagrees with the attribute never completes.

Two state machines drive two VMs of a kind at a time and try every path to every page:

- SEV: each VM has its own memory, a second slot over it (another GPA), and a slot over the other VM's memory; each of
  these is mapped with the C-bit and without. The same VM sees its page decrypted at either GPA, as SEV hardware without
  SNP does, because the key is the VM's and the tweak is the page's place in the host.
- SW_PROTECTED: pages of a guest_memfd slot and of a slot without file are converted to and fro. The file belongs to one
  GPA of one VM, and the VMM can neither read nor map it.

Behind them are directed tests of what random steps would rarely meet. SEVMM_DEEP=N runs N times as many sequences.
"""

from __future__ import annotations

import mmap
import os
import struct
from errno import EEXIST, EFAULT, EINVAL

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from kvmapi.abi import kvm
from kvmapi.errors import KvmError
from kvmapi.exits import Hlt, MemoryFault
from kvmapi.model.host import ModelHost
from tests.conformance.snippets import ALIAS, CODE, MIB, PAGE, PD_ALIAS, LongGuest, address_of, code
from tests.model.sev_guest import C_MASK, LOAD, STORE, SevGuest

pytestmark = pytest.mark.model
DEEP = int(os.environ.get("SEVMM_DEEP", "0"))
PRIVATE = kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE
HUGE = 2 * MIB


def drive(machine: type[RuleBasedStateMachine], examples: int, steps: int) -> None:
    run_state_machine_as_test(machine, settings=settings(
        max_examples=examples * (DEEP or 1), stateful_step_count=steps, derandomize=not DEEP, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    ))  # fmt: skip


# ---- SEV

PAGES = 3
SECOND_GPA, FOREIGN_GPA, MOVED_GPA = 64 * MIB, 128 * MIB, 96 * MIB
OWN_C, OWN, SECOND_C, SECOND, FOREIGN_C, FOREIGN = range(8, 14)  # entries of the directory behind ALIAS
own_paths = st.sampled_from(["identity", "own", "second"])
vms, pages = st.sampled_from([0, 1]), st.integers(0, PAGES - 1)


STORE_AND_LOOK = code("4889034d 8b01498b 01f4", "mov [rbx], rax; mov r8, [r9]; mov rax, [r9]; hlt")


class SevMachine(RuleBasedStateMachine):
    """`cells`: what was stored last in each host page, and who did: a VM by a private access, or None by a raw one."""

    def __init__(self) -> None:
        super().__init__()
        self.host = ModelHost()
        self.guests = [SevGuest(self.host, LOAD + STORE + STORE_AND_LOOK, size=2 * HUGE) for _ in range(2)]
        self.cells: dict[tuple[int, int], tuple[int | None, int]] = {}
        self.stored: set[int] = set()
        self.count = 0
        self.second = [SECOND_GPA, SECOND_GPA]
        for vm, guest in enumerate(self.guests):
            other = self.guests[1 - vm]
            guest.vm.set_user_memory_region(5, SECOND_GPA, HUGE, guest.hva + HUGE)
            guest.vm.set_user_memory_region(6, FOREIGN_GPA, HUGE, other.hva + HUGE)
            for number, gpa in ((OWN_C, HUGE), (SECOND_C, SECOND_GPA), (FOREIGN_C, FOREIGN_GPA)):
                guest.store(PD_ALIAS + 8 * number, gpa | 0x83 | C_MASK)
                guest.store(PD_ALIAS + 8 * (number + 1), gpa | 0x83)
            for page in range(PAGES):
                self.private_store(vm, vm, page, "identity")

    def teardown(self) -> None:
        for guest in self.guests:
            guest.__exit__()

    def address(self, vm: int, owner: int, page: int, path: str, c: bool) -> int:
        """Where `vm` has the page of `owner`, seen through the C-bit or not."""
        if path == "identity" and vm == owner:
            return HUGE + page * PAGE if c else ALIAS + HUGE + page * PAGE
        first = FOREIGN_C if vm != owner else SECOND_C if path == "second" else OWN_C
        return ALIAS + (first + (not c)) * HUGE + page * PAGE

    def value(self) -> int:
        self.count += 1
        value = int.from_bytes(os.urandom(6), "little") << 16 | self.count
        self.stored.add(value)
        return value

    @rule(vm=vms, owner=vms, page=pages, path=own_paths)
    def private_store(self, vm: int, owner: int, page: int, path: str) -> None:
        value = self.value()
        self.guests[vm].store(self.address(vm, owner, page, path, True), value)
        self.cells[owner, page] = (vm, value)
        assert self.seen_by_vmm(owner, page) not in self.stored

    @rule(vm=vms, owner=vms, page=pages, path=own_paths)
    def private_load(self, vm: int, owner: int, page: int, path: str) -> None:
        got = self.guests[vm].load(self.address(vm, owner, page, path, True))
        writer, value = self.cells[owner, page]
        if writer == vm:
            assert got == value
        else:
            assert got not in self.stored, "what somebody else stored shows as garbage"

    @rule(vm=vms, owner=vms, page=pages, path=own_paths)
    def raw_store(self, vm: int, owner: int, page: int, path: str) -> None:
        value = self.value()
        self.guests[vm].store(self.address(vm, owner, page, path, False), value)
        self.cells[owner, page] = (None, value)
        assert self.seen_by_vmm(owner, page) == value

    @rule(vm=vms, owner=vms, page=pages, path=own_paths)
    def raw_load(self, vm: int, owner: int, page: int, path: str) -> None:
        self.check_raw(owner, page, self.guests[vm].load(self.address(vm, owner, page, path, False)))

    @rule(vm=vms, owner=vms, page=pages, path=own_paths, other=own_paths, private=st.booleans())
    def store_and_look(self, vm: int, owner: int, page: int, path: str, other: str, private: bool) -> None:
        """Within one run: a store through the C-bit and a look without it, or the other way round."""
        guest, value = self.guests[vm], self.value()
        to, look = self.address(vm, owner, page, path, private), self.address(vm, owner, page, other, not private)
        assert guest.again(rip=CODE + len(LOAD + STORE), rbx=to, r9=look, rax=value) == Hlt()
        self.cells[owner, page] = (vm if private else None, value)
        got = guest.regs().rax
        assert got == guest.regs().r8 and got not in self.stored
        if private:
            assert got == self.seen_by_vmm(owner, page)
        else:
            assert self.seen_by_vmm(owner, page) == value

    @rule(owner=vms, page=pages)
    def vmm_load(self, owner: int, page: int) -> None:
        self.check_raw(owner, page, self.seen_by_vmm(owner, page))

    @rule(owner=vms, page=pages)
    def vmm_store(self, owner: int, page: int) -> None:
        value = self.value()
        self.guests[owner].put(HUGE + page * PAGE, struct.pack("<Q", value))
        self.cells[owner, page] = (None, value)

    @rule(source=vms, page=pages, into=vms, to=pages)
    def vmm_copies(self, source: int, page: int, into: int, to: int) -> None:
        """Ciphertext that was moved is garbage to everybody, also to who stored it."""
        if (source, page) == (into, to):
            return
        self.guests[into].put(HUGE + to * PAGE, self.guests[source].get(HUGE + page * PAGE, PAGE))
        writer, value = self.cells[source, page]
        self.cells[into, to] = (None, value) if writer is None else (None, self.seen_by_vmm(into, to))

    @rule(vm=vms)
    def a_slot_moves(self, vm: int) -> None:
        guest = self.guests[vm]
        gpa = self.second[vm] = MOVED_GPA if self.second[vm] == SECOND_GPA else SECOND_GPA
        guest.vm.set_user_memory_region(5, gpa, HUGE, guest.hva + HUGE)
        guest.store(PD_ALIAS + 8 * SECOND_C, gpa | 0x83 | C_MASK)
        guest.store(PD_ALIAS + 8 * SECOND, gpa | 0x83)

    @rule(vm=vms, page=pages, path=own_paths)
    def code_without_the_c_bit(self, vm: int, page: int, path: str) -> None:
        """A private page is executed decrypted through any mapping of its guest; the same address shows data as it is."""
        guest = self.guests[vm]
        guest.store(self.address(vm, vm, page, "identity", True), int.from_bytes(LOAD.ljust(8, b"\x90"), "little"))
        at = self.address(vm, vm, page, path, False)
        assert guest.again(rip=at, rbx=at, rax=0) == Hlt()
        assert guest.regs().rax == self.seen_by_vmm(vm, page) != int.from_bytes(LOAD.ljust(8, b"\x90"), "little")
        self.cells[vm, page] = (vm, int.from_bytes(LOAD.ljust(8, b"\x90"), "little"))

    def seen_by_vmm(self, owner: int, page: int) -> int:
        return int.from_bytes(self.guests[owner].get(HUGE + page * PAGE, 8), "little")

    def check_raw(self, owner: int, page: int, got: int) -> None:
        writer, value = self.cells[owner, page]
        if writer is None:
            assert got == value
        else:
            assert got not in self.stored, "a private page was read in the clear"
        assert got == self.seen_by_vmm(owner, page)


def test_sev(no_leaks: None) -> None:
    drive(SevMachine, 8, 40)


# ---- SW_PROTECTED

AT, BARE = 16 * MIB, 32 * MIB  # a slot with a guest_memfd, and one without
ACCESSES = {"load": CODE, "store": CODE + len(LOAD), "fetch": -1, "store across": CODE + len(LOAD)}


class ProtectedMachine(RuleBasedStateMachine):
    """`shared` and `private`: what stands on either side of each page; `is_private`: which side the guest sees."""

    def __init__(self) -> None:
        super().__init__()
        self.host = ModelHost()
        self.guests = [LongGuest(self.host, LOAD + STORE, 1) for _ in range(2)]
        self.user = [mmap.mmap(-1, 2 * PAGES * PAGE) for _ in range(2)]
        self.files = [guest.vm.create_guest_memfd(PAGES * PAGE) for guest in self.guests]
        self.shared = {(vm, page): 0 for vm in range(2) for page in range(2 * PAGES)}
        self.private = {(vm, page): 0 for vm in range(2) for page in range(PAGES)}
        self.is_private: set[tuple[int, int]] = set()
        self.secrets: set[int] = set()
        self.count = 0
        for guest, user, file in zip(self.guests, self.user, self.files, strict=True):
            hva = address_of(user)
            guest.vm.set_user_memory_region2(5, AT, PAGES * PAGE, hva, guest_memfd=file.fd)
            guest.vm.set_user_memory_region(6, BARE, PAGES * PAGE, hva + PAGES * PAGE)

    def teardown(self) -> None:
        for guest, file in zip(self.guests, self.files, strict=True):
            file.close()
            guest.__exit__()

    @staticmethod
    def gpa(page: int) -> int:
        return AT + page * PAGE if page < PAGES else BARE + (page - PAGES) * PAGE

    def value(self) -> int:
        self.count += 1
        return int.from_bytes(os.urandom(6), "little") << 16 | self.count

    @rule(vm=vms, page=st.integers(0, 2 * PAGES - 1), private=st.booleans())
    def convert(self, vm: int, page: int, private: bool) -> None:
        self.guests[vm].vm.set_memory_attributes(self.gpa(page), PAGE, PRIVATE if private else 0)
        (self.is_private.add if private else self.is_private.discard)((vm, page))

    @rule(vm=vms, page=st.integers(0, 2 * PAGES - 1), alias=st.booleans(), at=st.sampled_from([0, 8, PAGE - 8]))
    def store(self, vm: int, page: int, alias: bool, at: int) -> None:
        guest, value = self.guests[vm], self.value()
        va = (ALIAS if alias else 0) + self.gpa(page)
        if (vm, page) in self.is_private and page >= PAGES:
            self.refused(vm, page, "store", va, value)
            return
        assert guest.again(rip=ACCESSES["store"], rbx=va, rax=value) == Hlt()
        if (vm, page) in self.is_private:
            self.private[vm, page] = value
            self.secrets.add(value)
        else:
            self.shared[vm, page] = value

    @rule(vm=vms, page=st.integers(0, 2 * PAGES - 1), alias=st.booleans(), kind=st.sampled_from(["load", "fetch", "store across"]))
    def load(self, vm: int, page: int, alias: bool, kind: str) -> None:
        guest = self.guests[vm]
        va = (ALIAS if alias else 0) + self.gpa(page)
        if (vm, page) in self.is_private and page >= PAGES:
            self.refused(vm, page, kind, va, self.value())
            return
        assert guest.again(rbx=va) == Hlt()
        assert guest.regs().rax == (self.private if (vm, page) in self.is_private else self.shared)[vm, page]

    def refused(self, vm: int, page: int, kind: str, va: int, value: int) -> None:
        """Private without a file: the exit says which page, and neither registers nor memory changed, however often."""
        guest = self.guests[vm]
        if kind == "store across":
            va -= 4  # its first bytes are in the page before, whichever side that is on, or where no memory is
            if page == PAGES:
                return
            if (vm, page - 1) in self.is_private:
                page -= 1
        guest.regs(rip=va if kind == "fetch" else ACCESSES[kind], rbx=va, rax=value, rflags=2)
        before, memory, user = bytes(guest.regs()), guest.memory[:], self.user[vm][:]
        for _ in range(2):
            assert guest.vcpu.run() == EFAULT
            assert guest.vcpu.exit(EFAULT) == MemoryFault(PRIVATE, self.gpa(page), PAGE, EFAULT)
            assert bytes(guest.regs()) == before and self.user[vm][:] == user
            same = [at for at in range(0, len(memory), PAGE) if guest.memory[at : at + PAGE] != memory[at : at + PAGE]]
            assert all(0x1000 <= at < 0x6000 for at in same), "only accessed bits of the tables"

    @rule(vm=vms, page=st.integers(0, 2 * PAGES - 1))
    def vmm_stores(self, vm: int, page: int) -> None:
        value = self.value()
        self.user[vm][page * PAGE : page * PAGE + 8] = struct.pack("<Q", value)
        self.shared[vm, page] = value

    @rule(vm=vms)
    def vmm_looks(self, vm: int) -> None:
        for page in range(2 * PAGES):
            got = struct.unpack("<Q", self.user[vm][page * PAGE : page * PAGE + 8])[0]
            assert got == self.shared[vm, page] and got not in self.secrets

    @rule(vm=vms, page=pages)
    def vmm_punches(self, vm: int, page: int) -> None:
        self.files[vm].punch_hole(page * PAGE, PAGE)
        self.private[vm, page] = 0

    @rule(vm=vms, to=vms, gpa=st.sampled_from([64 * MIB, AT + MIB]))
    def the_file_is_bound_again(self, vm: int, to: int, gpa: int) -> None:
        """To another GPA, or in another VM."""
        with pytest.raises(KvmError) as caught:
            self.guests[to].vm.set_user_memory_region2(7, gpa, PAGE, address_of(self.user[to]), guest_memfd=self.files[vm].fd)
        assert caught.value.errno == (EEXIST if to == vm else EINVAL)

    @rule(vm=vms)
    def the_file_is_read_and_mapped(self, vm: int) -> None:
        with pytest.raises(OSError):
            self.host.mmap(self.files[vm].fd, PAGE)
        with pytest.raises(OSError):
            os.pread(self.files[vm].fd, 8, 0)

    @precondition(lambda self: any(page >= PAGES for _, page in self.is_private))
    @rule(data=st.data())
    def the_vmm_gives_in(self, data: st.DataObject) -> None:
        """After the exit the page is made shared, and the instruction is done as if nothing had been."""
        vm, page = data.draw(st.sampled_from(sorted(at for at in self.is_private if at[1] >= PAGES)))
        guest, value = self.guests[vm], self.value()
        self.refused(vm, page, "store", self.gpa(page), value)
        self.convert(vm, page, False)
        assert guest.run() == Hlt() and guest.regs().rax == value
        self.shared[vm, page] = value


def test_sw_protected(no_leaks: None) -> None:
    drive(ProtectedMachine, 10, 40)
