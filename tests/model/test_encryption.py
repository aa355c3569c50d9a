"""Private memory of a real SEV VM on the model, seen by its guest and by its VMM.

1. What the guest stores through the C-bit is ciphertext in the VMM's memory whenever the guest is stopped.
2. What the VMM stores over it, the guest reads as garbage; never as the old plaintext, never as what was stored.
3. Ciphertext put back to its page is its old plaintext; on another page it is garbage.
4. The C-bit clear shows the ciphertext to the guest too.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from kvmapi.exits import Hlt, Io
from kvmapi.launch import Launch
from kvmapi.sev import SevPlatform
from kvmapi.system import System
from tests.conformance.snippets import ALIAS, DATA, MIB, PAGE, code
from tests.model.sev_guest import SevGuest

pytestmark = pytest.mark.model
SECRET = 0x5EC2E7_0F_7E57
PLAIN = struct.pack("<Q", SECRET)


@pytest.fixture
def guest(model_host: Any, no_leaks: None) -> Iterator[SevGuest]:
    with SevGuest(model_host) as made:
        yield made


def test_launch_encrypts_in_place(model_host: Any) -> None:
    with SevGuest(model_host, private=MIB) as guest:
        assert guest.get(0, MIB).count(bytes(16)) == 0, "zeroes are ciphertext too"
        assert not any(guest.get(MIB, MIB)), "what was not part of the launch is as it was"


def test_the_vmm_sees_ciphertext(guest: SevGuest) -> None:
    guest.store(DATA, SECRET)
    assert PLAIN not in guest.get(0, 2 * MIB)
    assert guest.load(DATA) == SECRET


def test_each_store_changes_the_ciphertext(guest: SevGuest) -> None:
    seen = set()
    for value in (1, 2, 3, 1):
        guest.store(DATA, value)
        seen.add(guest.get(DATA, 16))
    assert len(seen) == 3, "deterministic per page and content"


def test_what_the_vmm_stores_is_garbage_to_the_guest(guest: SevGuest) -> None:
    guest.store(DATA, SECRET)
    guest.put(DATA, struct.pack("<Q", 0x1111111111111111))
    assert guest.load(DATA) not in (SECRET, 0x1111111111111111)


def test_a_store_by_the_vmm_is_not_lost_to_a_cached_page(guest: SevGuest) -> None:
    """Only the 16-byte block that the VMM wrote changes; the rest of the page is still the guest's."""
    guest.store(DATA, SECRET)
    guest.store(DATA + 64, SECRET)
    assert guest.load(DATA) == SECRET
    guest.put(DATA, b"x")
    assert guest.load(DATA) != SECRET and guest.load(DATA + 64) == SECRET


def test_replay(guest: SevGuest) -> None:
    """SEV does not protect integrity: old ciphertext on its own page is old plaintext. The model shows that too."""
    guest.store(DATA, SECRET)
    old = guest.get(DATA, PAGE)
    guest.store(DATA, 42)
    assert guest.load(DATA) == 42
    guest.put(DATA, old)
    assert guest.load(DATA) == SECRET


def test_moved_ciphertext_is_garbage(guest: SevGuest) -> None:
    guest.store(DATA, SECRET)
    guest.put(DATA + PAGE, guest.get(DATA, PAGE))
    assert guest.load(DATA + PAGE) != SECRET and guest.load(DATA) == SECRET


def test_another_guest_cannot_read_it(model_host: Any) -> None:
    with SevGuest(model_host) as one, SevGuest(model_host) as two:
        one.store(DATA, SECRET)
        two.put(DATA, one.get(DATA, PAGE))
        assert two.load(DATA) != SECRET


def test_the_c_bit_clear_shows_ciphertext(guest: SevGuest) -> None:
    guest.store(DATA, SECRET)
    cipher = struct.unpack("<Q", guest.get(DATA, 8))[0]
    assert guest.load(ALIAS + DATA) == cipher != SECRET
    assert guest.load(DATA) == SECRET


def test_shared_memory_is_plain_both_ways(guest: SevGuest) -> None:
    guest.store(ALIAS + DATA, SECRET)
    assert guest.get(DATA, 8) == PLAIN
    guest.put(DATA, b"answered")
    assert guest.load(ALIAS + DATA) == struct.unpack("<Q", b"answered")[0]


BOTH = code(
    "48890349 8b09498b 014c8903 4d8b1149 89014d8b 1948890b f4",
    "mov [rbx], rax; mov rcx, [r9]; mov rax, [r9]; mov [rbx], r8; mov r10, [r9]; mov [r9], rax; mov r11, [r9]; mov [rbx], rcx; hlt",
)


def test_both_aliases_within_one_run(model_host: Any) -> None:
    """Private store, ciphertext read through the alias, other private store: the alias follows, without an exit."""
    with SevGuest(model_host, BOTH) as guest:
        assert guest.again(rax=SECRET, r8=77, rbx=DATA, r9=ALIAS + DATA) == Hlt()
        regs = guest.regs()
        assert regs.rcx == regs.rax != SECRET, "the alias shows one ciphertext twice"
        assert regs.r10 != regs.rcx, "and another after the private store"
        assert regs.r11 == regs.rcx, "what was stored through the alias reads back"
        assert SECRET.to_bytes(8, "little") not in guest.get(0, 2 * MIB)


def test_a_slot_that_moves_keeps_its_secrets(guest: SevGuest) -> None:
    guest.vm.set_user_memory_region(3, 64 * MIB, PAGE, guest.hva + DATA)
    guest.store(DATA, SECRET)
    assert guest.load(64 * MIB) == SECRET, "one page of the host behind two GPAs"
    guest.vm.set_user_memory_region(3, 96 * MIB, PAGE, guest.hva + DATA)
    assert guest.load(96 * MIB) == SECRET and guest.load(DATA) == SECRET
    assert PLAIN not in guest.get(0, 2 * MIB)


FILL = code("48890348 ffc04881 c3001000 0048ffc9 75eef4", "0: mov [rbx], rax; inc rax; add rbx, 4096; dec rcx; jnz 0b; hlt")
SUM = code("48030348 81c30010 000048ff c975f1f4", "0: add rax, [rbx]; add rbx, 4096; dec rcx; jnz 0b; hlt")


def test_more_pages_than_the_arena_has_frames(model_host: Any) -> None:
    """Three times the arena in one run: frames are given up and come back with their contents."""
    pages = 1536
    with SevGuest(model_host, FILL + SUM, size=8 * MIB) as guest:
        assert guest.again(rbx=MIB, rcx=pages, rax=1) == Hlt()
        assert guest.again(rip=0x10000 + len(FILL), rbx=MIB, rcx=pages, rax=0) == Hlt()
        assert guest.regs().rax == pages * (pages + 1) // 2
        for page in (0, 511, 512, 1535):
            assert guest.get(MIB + page * PAGE, 8) != struct.pack("<Q", page + 1)


def test_the_guest_runs_on_after_the_vmm_looked(guest: SevGuest) -> None:
    for number in range(300):
        guest.store(DATA + PAGE * (number % 7), number)
        assert guest.load(DATA + PAGE * (number % 7)) == number
        if number % 50 == 0:
            guest.put(MIB, os.urandom(PAGE))


def test_each_page_that_stands_decrypted_is_compared_at_an_entry_and_no_other(model_host: Any, guest: SevGuest) -> None:
    """A page that was given up may be the VMM's, and written all the time: it must not make each entry look at all of them."""
    secure = model_host.file(guest.vm.fd).physical.secure
    for number in range(12):
        page = DATA + PAGE * (number % 5)
        guest.store(page, number)
        assert {frame.address for frame in secure._frames.values()} == set(secure._homes._keys)
        guest.load(ALIAS + page if number % 3 else page)  # with the C-bit clear: given up
        assert set(secure._frames) == set(secure._homes._keys) and secure._homes.same()
        assert (guest.hva + page in secure._frames) == (number % 3 == 0)


def test_fetches_are_private_whatever_the_c_bit(guest: SevGuest) -> None:
    """Code through the alias is decrypted all the same: the VMM cannot feed a guest shared code."""
    assert guest.again(rip=ALIAS + 0x10000, rbx=DATA) == Hlt()


def test_memory_is_ciphertext_for_ever_after_the_guest(model_host: Any) -> None:
    guest = SevGuest(model_host)
    with guest:
        guest.store(DATA, SECRET)
        memory = guest.memory
        guest.closing[0].close()
        for vcpu in guest.vcpus:
            vcpu.close()
        guest.vm.close()
        assert PLAIN not in memory[:]


def test_a_vcpu_that_never_got_a_cpuid_runs_the_encrypted_code(model_host: Any) -> None:
    """The guest is encrypted because of INIT2, not because of what its CPUID says. Real mode: everything is private there."""
    with System(model_host) as system, SevPlatform(model_host) as platform, system.create_vm(2) as vm:
        launch = Launch(vm, platform).init2()
        memory = mmap.mmap(-1, 4 * PAGE)
        hva = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        vm.set_user_memory_region(0, 0, len(memory), hva)
        memory[PAGE : PAGE + 5] = b"\xb0\x58\xe6\x10\xf4"  # mov al, 'X'; out 0x10, al; hlt
        started = launch.start(0)
        started.update_data(hva, len(memory))
        started.measure().finish()
        with vm.create_vcpu() as vcpu:
            sregs, regs = vcpu.get_sregs(), vcpu.get_regs()
            sregs.cs.base = sregs.cs.selector = 0
            regs.rip, regs.rflags = PAGE, 2
            vcpu.set_sregs(sregs)
            vcpu.set_regs(regs)
            assert vcpu.run() == 0
            assert (io := vcpu.exit()) and isinstance(io, Io) and (io.port, io.data) == (0x10, b"X")
