"""Hostile guests: what a guest does to harm, or to wear out, its VMM and the VMs beside it.

Each test is one attack (`vmm.selftests.hostile`), run beside another VM that must not notice (`Attack`). What it cost stands in
the test's notes: exits, CPU time for each, growth of the process's own memory, what the VMM keeps of the guest. The guests of SEV-ES
that lie in their GHCBs are in `hostile_ghcb`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import ExitStack

from kvmapi.abi import kvm
from kvmapi.abi.psp import SEV_RET_POLICY_FAILURE
from kvmapi.abi.sev import KVM_SEV_DBG_DECRYPT, kvm_sev_dbg
from kvmapi.exit_types import Exit, Hypercall, MemoryFault
from kvmapi.vcpu import Vcpu
from vmm.selftests.api import Bench, Case, MachineFactory, Slot, Sync, check_equal, expect_firmware, fail, runs_on
from vmm.selftests.hostile import guests
from vmm.selftests.hostile.attack import Attack
from vmm.selftests.hostile.tables_guest import TABLES
from vmm.selftests.waiting import wait_until

AREA, PAGE = 0x800000, 4096
SLOT, SLOT_PAGES, ELSEWHERE = 0xB0000000, 16, 0xB8000000
STOP, ROUNDS = 0x5F00, 0x5F08
CHANGES = 24
Note = Callable[[str], None]

converting = runs_on("sw-protected", "sev", "sev-es", needs={"hypercall"})


@runs_on("plain", "sw-protected", "sev", "sev-es", needs={"hypercall"})
def test_hypercall_storm(machine: MachineFactory, note: Note) -> None:
    """Thousands of MAP_GPA_RANGE with every kind of wrong number: the legal ones succeed, the others get -EINVAL, nothing piles up."""
    rounds = 1500
    with Attack(machine, guests.STORM, note, arguments=f"rounds={rounds}") as attack:
        m = attack.bench
        m.handlers.append(_aligned)
        legal, refused, *_ = m.sync(stage=1).args
        check_equal(legal + refused, rounds, "legal and refused calls")
        check_equal(m.converter.total, legal, "conversions that the VMM made")
        check_equal(m.dispatcher.refused <= refused, True, "no more refusals than calls that deserved one")
        m.done()


def _aligned(vcpu: Vcpu, exit: Exit) -> bool:
    """KVM itself answers what is not aligned or empty (-EINVAL): the VMM never sees it."""
    if isinstance(exit, Hypercall) and (exit.args[0] % PAGE or not exit.args[1]):
        fail(f"the VMM was asked for a conversion of {exit.args[1]} pages at {exit.args[0]:#x}")
    return False


@converting
def test_ping_pong(machine: MachineFactory, note: Note) -> None:
    """Every page private and back, many times: nothing private is shown while it is, or left behind afterwards."""
    with Attack(machine, guests.PING_PONG, note) as attack:
        m, pages, rounds = attack.bench, 128, 3
        while isinstance(said := m.next(), Sync):
            gpa, secret, *_ = said.args
            m.expect_map(gpa, 4096, "private")
            if secret.to_bytes(8, "little")[2:] in m.memory.read(gpa, 4096):
                fail(f"the host sees what stands in the private page at {gpa:#x}")
        check_equal(m.converter.total, 2 * pages * rounds, "conversions")
        m.expect_map(AREA, pages * 4096, "shared")


@converting
def test_racing_conversions(case: Case, machine: MachineFactory, note: Note) -> None:
    """Three vCPUs convert the same pages in opposite directions while they use them; where private memory has no page, by faults too."""
    vcpus, lazy = 3, case.type == "sw-protected"
    options = {"vcpus": vcpus, "arguments": "rounds=150", "lazy_private": lazy}
    with Attack(machine, guests.RACE, note, **options) as attack, ExitStack() as runs:
        m = attack.bench
        others = [runs.enter_context(m.background(vcpu=vcpu)) for vcpu in range(1, vcpus)]
        gpa, pages, *_ = m.sync(stage=1).args
        for other in others:
            other.result()
        m.expect_map(gpa, pages * 4096, "shared")
        m.expect_memory(gpa, (0xFEE1900D).to_bytes(8, "little"))
        m.done()


@runs_on("plain", "sw-protected", "sev", "sev-es")
def test_racing_memslots(case: Case, machine: MachineFactory, note: Note) -> None:
    """A guest that hammers a memslot while the VMM deletes it, makes it again, moves it and changes its attributes."""
    protected = case.type == "sw-protected"
    with Attack(machine, guests.SLOTS, note, slots=[Slot(10, SLOT, SLOT_PAGES * 4096, guest_memfd=protected)]) as attack:
        m = attack.bench
        m.handlers.append(_retry_fault)
        slot = m.memory.slot_at(SLOT)
        assert slot is not None
        with m.background(lambda: m.sync(stage=1)) as run:
            for change in range(CHANGES):
                exits = sum(m.counts.values())
                m.vm.set_user_memory_region2(10, SLOT, 0, slot.hva)
                wait_until(lambda exits=exits: sum(m.counts.values()) > exits or not run.running, 5, "an exit of the guest")  # type: ignore[misc]
                if protected:
                    m.vm.set_memory_attributes(SLOT, slot.size, kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE * (change & 1))
                    m.vm.set_user_memory_region2(10, SLOT, slot.size, slot.hva, guest_memfd=slot.guest_memfd.fd)  # type: ignore[union-attr]
                else:
                    m.vm.set_user_memory_region2(10, ELSEWHERE if change & 1 else SLOT, slot.size, slot.hva)
                    m.vm.set_user_memory_region2(10, SLOT, slot.size, slot.hva)
                rounds = m.memory.read(ROUNDS, 8)
                wait_until(lambda rounds=rounds: m.memory.read(ROUNDS, 8) != rounds or not run.running, 5, "a round of the guest")  # type: ignore[misc]
            if protected:
                m.vm.set_memory_attributes(SLOT, slot.size, 0)
            m.memory.write(STOP, b"\1")
            count, gone, *_ = run.result().args
        note(f"{CHANGES} changes during {count:,} rounds of the guest, {gone:,} of which found no memory")
        m.sync(stage=2)
        for page in range(SLOT_PAGES):
            m.expect_memory(SLOT + page * 4096, (0xA11 + page).to_bytes(8, "little"))
        m.done()


def _retry_fault(vcpu: Vcpu, exit: Exit) -> bool:
    """A private page whose slot is away just now: the slot comes back."""
    return isinstance(exit, MemoryFault)


@runs_on("plain", "sw-protected", "sev", "sev-es")
def test_flood(machine: MachineFactory, note: Note) -> None:
    """More console output than is kept, and hundreds of accesses to ports that nobody has: what is kept of them does not grow."""
    lines, accesses, limit = 8, 400, 16384
    with Attack(machine, guests.FLOOD, note, arguments=f"lines={lines} accesses={accesses}") as attack:
        m = attack.bench
        console = m.devices.console
        console.limit = limit
        m.done()
        check_equal(len(console.data) + console.dropped, lines * 4096, "bytes printed")
        check_equal(len(console.data), limit, "bytes kept")
        check_equal(m.devices.ports.unknown, 2 * accesses, "accesses that no device answered")
        check_equal(len(m.notes()), 2, "sentences about it in the report")


@runs_on("plain", "sw-protected", "sev", "sev-es")
def test_looping_tables(machine: MachineFactory, note: Note) -> None:
    """Page tables that are their own lower levels, that lead anywhere, that take themselves away: the guest gets what a processor gives."""
    with Attack(machine, TABLES, note) as attack:
        m = attack.bench
        read, anywhere, *_ = m.sync(stage=1).args
        check_equal(0 < read <= 200 and 0 < anywhere < 320, True, f"walks that ended in memory ({read} and {anywhere})")
        m.done()


@runs_on("sev", "sev-es", needs={"hypercall"})
def test_plaintext_out_of_reach(machine: MachineFactory) -> None:
    """A VMM that helps a guest to another VM's secret: by its ciphertext anywhere, by its memory itself, by the debugger."""
    victim = machine(guests.NEIGHBOUR)
    gpa, _, *_ = victim.sync(stage=1).args

    def share(m: Bench) -> None:
        m.vm.set_user_memory_region(10, SLOT, 2 * PAGE, victim.memory.hva(gpa, 2 * PAGE))
        m.tables.map(SLOT, SLOT, 2 * PAGE, private=True)

    thief = machine(guests.NEIGHBOUR, arguments="foreign", prepare=share)
    own, area, *_ = thief.sync(stage=1).args
    pages = [m.memory.read(at, PAGE) for m, start in ((victim, gpa), (thief, own)) for at in (start, start + PAGE)]
    check_equal(len(set(pages)), 4, "different pages of ciphertext")
    thief.memory.write(area, b"".join(page * 4 for page in pages))  # at each place that a unit of encryption may have for a page
    check_equal(thief.sync(stage=2).args[0], 0, "words of a secret that could be read")
    thief.done()
    shown = ctypes.create_string_buffer(PAGE)
    data = kvm_sev_dbg(victim.memory.hva(gpa, PAGE), ctypes.addressof(shown), PAGE)
    with expect_firmware(SEV_RET_POLICY_FAILURE):
        victim.vm.sev_op(KVM_SEV_DBG_DECRYPT, data)
    victim.sync(stage=2)
    victim.done()
