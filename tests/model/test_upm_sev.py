"""Private slots under SEV guests: which half an access reaches is KVM's rule, what it finds there is the C-bit's doing.

Through the identity map the guest has the C-bit set, through ALIAS it has not. The guest of UPM mode runs from private
memory altogether, which LAUNCH_UPDATE_DATA filled.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
from typing import Any

import pytest

from kvmapi.abi import dialects as d
from kvmapi.abi import sev
from kvmapi.errors import KvmError
from kvmapi.exits import Hlt, Hypercall
from kvmapi.session import OwnerSession
from tests.conformance.snippets import ALIAS, CODE, MIB, PAGE, address_of, code
from tests.model.test_isolation import MARK as WRITES_COMPLEMENT
from tests.model.test_isolation import scan
from tests.model.upm import AT, CALL, CLR, ENCRYPTED, LOAD, MARK, PAT, PAT2, STORE, Upm, fault, host, make_private, make_shared

pytestmark = pytest.mark.model
SEV = 2
OPEN = ALIAS + AT  # the test slot with the C-bit clear
DIALECTS = pytest.mark.parametrize("dialect", ["upm-v6", "upm-v7"])


def launched(dialect: str, **options: Any) -> Upm:
    guest = Upm(host(dialect), SEV, **options)
    guest.launch()
    return guest


def mapped(dialect: str) -> Upm:
    """A guest whose own memory is private: UPM mode."""
    guest = Upm(host(dialect), SEV, private_low=True)
    guest.vm.enable_cap(d.KVM_CAP_UNMAPPED_PRIVATE_MEM)
    if dialect == "upm-v7":
        guest.vm.register_private(0, 2 * MIB)
    return guest


@DIALECTS
def test_both_halves_in_both_views(dialect: str, no_leaks: None) -> None:
    with launched(dialect) as guest:
        guest.fill(PAT)
        assert guest.says(AT, 2, CLR) == 0
        assert guest.value(OPEN) == PAT
        assert guest.store(PAT2) == Hlt()  # the C-bit on the shared half: ciphertext there
        assert guest.value() == PAT2 and guest.word() not in (PAT, PAT2)
        guest.fill(PAT)
        make_private(guest, 0, 2)
        assert guest.load(OPEN) == fault(False)
        assert guest.says(AT, 2, MARK) == 0
        assert guest.store(PAT2, AT + PAGE) == Hlt() and guest.value(AT + PAGE) == PAT2
        cipher = guest.secret(PAGE)
        assert cipher not in (0, PAT2) and guest.word(PAGE) == PAT
        assert guest.value(OPEN + PAGE) == cipher  # the C-bit clear shows what is really there
        assert guest.store(PAT, OPEN) == Hlt() and guest.secret() == PAT


@DIALECTS
def test_punching_destroys_what_stood_decrypted(dialect: str) -> None:
    with launched(dialect) as guest:
        make_private(guest, 0, 2)
        assert guest.says(AT, 2, MARK) == 0
        assert guest.store(PAT2) == Hlt() and guest.store(PAT2, AT + PAGE) == Hlt()
        make_shared(guest)
        assert guest.secret() == 0
        make_private(guest)
        assert guest.value(OPEN) == 0
        assert guest.value() != PAT2
        assert guest.value(AT + PAGE) == PAT2  # the neighbour is what it was
        guest.memfd.punch_hole(0, 2 * PAGE)
        assert guest.secret(PAGE) == 0


def test_punching_more_than_the_arena_holds() -> None:
    with launched("upm-v6", pages=1024) as guest:
        guest.memfd.allocate(0, 1024 * PAGE)
        assert guest.says(AT, 1024, MARK) == 0
        for page in (0, 511, 1023):
            assert guest.store(PAT2, AT + page * PAGE) == Hlt()
        guest.memfd.punch_hole(0, 1024 * PAGE)
        guest.memfd.allocate(0, 1024 * PAGE)
        assert [guest.value(OPEN + page * PAGE) for page in (0, 511, 1023)] == [0, 0, 0]


@DIALECTS
def test_two_guests_do_not_read_each_others_pages(dialect: str) -> None:
    with launched(dialect) as one, Upm(one.model, SEV, pages=None) as other:
        other.shared, other.memfd = other.mapping(2), one.memfd
        other.vm.set_private_region(10, AT, 2 * PAGE, address_of(other.shared), one.memfd.fd)
        other.launch()
        make_private(one)
        make_private(other)
        for guest in (one, other):
            assert guest.says(AT, 1, MARK) == 0
        assert one.store(PAT2) == Hlt()
        assert other.value() not in (PAT2, one.secret())


BOTH = code("488903 488b02 f4", "mov [rbx], rax; mov rax, [rdx]; hlt")
THREE = code("488b0a 488903 488b02 f4", "mov rcx, [rdx]; mov [rbx], rax; mov rax, [rdx]; hlt")


@pytest.mark.parametrize("private", [True, False])
def test_both_views_in_one_run(private: bool) -> None:
    """A page is seen one way at a time: what one view stored is in the other when the next instruction looks."""
    with launched("upm-v6", text=BOTH + THREE) as guest:
        both = len(LOAD + STORE + CALL)
        if private:
            guest.memfd.allocate(0, 2 * PAGE)
            assert guest.says(AT, 2, MARK) == 0

        def raw() -> int:
            return guest.secret() if private else guest.word()

        assert guest.go(both, 0, rbx=AT, rdx=OPEN, rax=PAT2) == Hlt()
        assert guest.regs().rax == raw() != PAT2
        assert guest.go(both + len(BOTH), 0, rbx=AT, rdx=OPEN, rax=PAT) == Hlt()
        assert guest.regs().rax == raw() != guest.regs().rcx
        assert guest.go(both, 0, rbx=OPEN, rdx=AT, rax=PAT) == Hlt()
        assert raw() == PAT != guest.regs().rax
        assert guest.go(both + len(BOTH), 0, rbx=OPEN, rdx=AT, rax=PAT2) == Hlt()
        assert raw() == PAT2 and guest.regs().rcx != guest.regs().rax != PAT2


@pytest.mark.parametrize("punched", [False, True])
def test_no_plaintext_of_a_private_half_in_this_process(punched: bool) -> None:
    """While the guest stands still; also of a page that user space punched after the guest wrote to it."""
    with launched("upm-v6", text=WRITES_COMPLEMENT) as guest:
        guest.memfd.allocate(0, 2 * PAGE)
        assert guest.says(AT, 2, MARK) == 0
        words = (int.from_bytes(os.urandom(8), "little"), int.from_bytes(os.urandom(8), "little"))
        assert guest.go(len(LOAD + STORE + CALL), 0, rbx=AT + 64, rax=words[0], rdx=words[1]) == Hlt()
        if punched:
            guest.memfd.punch_hole(0, PAGE)
        assert scan(words) == []


def test_addresses_without_memory_cost_nothing() -> None:
    with mapped("upm-v6") as guest:
        guest.launch()
        vm: Any = guest.model.file(guest.vm.fd)
        for number in range(1, 33):
            for attributes in (MARK, CLR):
                assert guest.says((number << 36) + 64 * MIB, 1, attributes) == 0
        assert not vm.rule._shared._partial and not vm.rule._private._partial


# ---- UPM mode
@DIALECTS
def test_a_guest_that_runs_from_private_memory(dialect: str) -> None:
    with mapped(dialect) as guest:
        guest.put(0x100000, PAT.to_bytes(8, "little"))
        owner = OwnerSession.create(guest.platform.pdh_cert_export()[0], sev.SEV_POLICY_NODBG)
        plain = guest.get(0, 2 * MIB)
        measured = guest.launch(sev.SEV_POLICY_NODBG, owner.dh_cert, owner.session)
        status = guest.platform.status()
        version = {"api_major": status.api_major, "api_minor": status.api_minor, "build": status.build}
        assert owner.verify(measured.measure, hashlib.sha256(plain).digest(), measured.nonce, **version)
        assert guest.get(0, 2 * MIB) == plain  # the shared half keeps what it held
        assert guest.low is not None
        assert guest.secret(0x100000, guest.low) not in (0, PAT)
        guest.put(0, bytes(2 * MIB))  # and is nothing to the guest: tables, code and data are private
        assert guest.value(0x100000) == PAT
        assert guest.store(PAT2, 0x100000) == Hlt() and guest.value(0x100000) == PAT2
        assert guest.get(0x100000, 8) == bytes(8)


@DIALECTS
def test_a_page_that_the_guest_makes_shared(dialect: str, no_leaks: None) -> None:
    with mapped(dialect) as guest:
        guest.launch()
        page = 0x100000
        assert guest.low is not None
        exit = guest.say(page, 1, 0)
        assert isinstance(exit, Hypercall) and exit.args[:3] == (page, 1, 0)
        guest.vcpu.answer_hypercall(0)
        assert guest.run() == Hlt()
        assert guest.load(ALIAS + page) == fault(False, page)  # user space has not done its part
        guest.low.punch_hole(page, PAGE)
        if dialect == "upm-v7":
            guest.vm.unregister_private(page, PAGE)
        assert guest.store(PAT, ALIAS + page) == Hlt()
        assert guest.get(page, 8) == PAT.to_bytes(8, "little")
        assert guest.says(page, 1, MARK) == 0  # no exit, the same bitmap
        assert guest.load(page) == fault(True, page)


@DIALECTS
def test_the_mode_is_of_private_slots(dialect: str) -> None:
    """Pages of other slots are shared until the guest makes them private: then nothing is behind them."""
    guest = mapped(dialect)
    with guest:
        memory = guest.mapping(1)
        guest.vm.set_user_memory_region(5, 2 * AT, PAGE, address_of(memory))
        guest.launch()
        assert guest.store(PAT, ALIAS + 2 * AT) == Hlt() and memory[:8] == PAT.to_bytes(8, "little")
        assert isinstance(guest.say(2 * AT, 1, ENCRYPTED), Hypercall)
        guest.vcpu.answer_hypercall(0)
        assert guest.run() == Hlt()
        assert guest.load(2 * AT) == fault(True, 2 * AT)
        assert guest.says(2 * AT, 1, CLR) == 0
        assert guest.value(ALIAS + 2 * AT) == PAT


def test_the_mode_means_nothing_to_a_plain_vm() -> None:
    with Upm(host("upm-v6")) as guest:
        guest.vm.enable_cap(d.KVM_CAP_UNMAPPED_PRIVATE_MEM)
        assert guest.value() == 0
        with pytest.raises(KvmError) as caught:
            guest.vm.enable_cap(d.KVM_CAP_UNMAPPED_PRIVATE_MEM, flags=1)
        assert caught.value.errno == errno.EINVAL


# ---- the launch
def test_only_what_is_registered_is_launched_in_private() -> None:
    with Upm(host("upm-v7"), SEV, private_low=True) as guest:
        guest.vm.register_private(MIB, MIB)
        assert guest.low is not None
        before = guest.get(0, 2 * MIB)
        guest.put(MIB, PAT.to_bytes(8, "little"))
        guest.launching.start(0).update_data(guest.hva, 2 * MIB)
        assert guest.get(CODE, len(LOAD)) != before[CODE : CODE + len(LOAD)]  # in place
        assert guest.get(MIB, 8) == PAT.to_bytes(8, "little")
        assert guest.secret(CODE, guest.low) == 0 and guest.secret(MIB, guest.low) not in (0, PAT)


def test_a_launch_over_slots_and_gaps() -> None:
    """A range of addresses that is ordinary, private and in no slot; blocks of 16 bytes at both ends."""
    with Upm(host("upm-v6"), SEV, pages=None) as guest:
        area, memfd = guest.mapping(4), guest.file(2 * PAGE)
        hva = address_of(area)
        area[:] = bytes(range(256)) * 64
        guest.memfd = memfd
        guest.vm.set_private_region(10, AT, 2 * PAGE, hva + PAGE, memfd.fd)
        started = guest.launching.start(0)
        started.update_data(hva + 16, 4 * PAGE - 32)
        raw = area[:]
        plain = bytes(range(256)) * 64
        assert raw[:16] == plain[:16] and raw[-16:] == plain[-16:]
        assert raw[16:32] != plain[16:32] and raw[3 * PAGE : 3 * PAGE + 16] != plain[:16]
        assert raw[PAGE : 3 * PAGE] == plain[PAGE : 3 * PAGE]
        started.update_data(guest.hva, 2 * MIB)
        started.measure().finish()
        assert guest.says(AT, 2, MARK) == 0
        assert [guest.value(AT + at).to_bytes(8, "little") for at in (0, PAGE)] == [plain[:8], plain[:8]]


def test_a_launch_into_a_file_that_is_too_short() -> None:
    with Upm(host("upm-v6"), SEV, pages=None) as guest:
        memory, memfd = guest.mapping(2), guest.file(PAGE)
        guest.vm.set_private_region(10, AT, 2 * PAGE, address_of(memory), memfd.fd)
        started = guest.launching.start(0)
        with pytest.raises(KvmError) as caught:
            started.update_data(address_of(memory), 2 * PAGE)
        assert caught.value.errno == errno.EFAULT


def test_the_region_ioctls_of_v6_still_pin() -> None:
    with Upm(host("upm-v6"), SEV) as guest:
        guest.vm.register_enc_region(guest.hva, 2 * MIB)
        guest.vm.unregister_enc_region(guest.hva, 2 * MIB)
    with Upm(host("upm-v6")) as guest, pytest.raises(KvmError) as caught:
        guest.vm.register_enc_region(guest.hva, PAGE)
    assert caught.value.errno == errno.ENOTTY


@DIALECTS
def test_at_random(dialect: str) -> None:
    """Halves, views and conversions against a reference that knows who wrote a word last, and how."""
    pages, dice = 3, random.Random(7)
    with launched(dialect, pages=pages) as guest:
        assert guest.says(AT, pages, CLR) == 0
        private, marked = [False] * pages, [False] * pages
        words: dict[tuple[bool, int], tuple[bool, int]] = {}
        for step in range(1, 400):
            page, what, secret = dice.randrange(pages), dice.randrange(5), dice.random() < 0.6
            va = (AT if secret else OPEN) + page * PAGE
            if what == 0:
                private[page] = not private[page]
                (make_private if private[page] else make_shared)(guest, page)
                if not private[page]:
                    words.pop((True, page), None)
            elif what == 1:
                marked[page] = not marked[page]
                whole = [at for at in range(pages) if marked[at]]
                if dialect == "upm-v7":
                    assert guest.says(AT + page * PAGE, 1, MARK if marked[page] else CLR) == 0
                else:  # one range: mark all, then clear what is not
                    assert guest.says(AT, pages, MARK) == 0
                    for at in set(range(pages)) - set(whole):
                        assert guest.says(AT + at * PAGE, 1, CLR) == 0
            elif private[page] != marked[page]:
                assert guest.load(va) == fault(marked[page], AT + page * PAGE)
            elif what == 2:
                assert guest.store(step, va) == Hlt()
                words[private[page], page] = secret, step
            else:
                how, value = words.get((private[page], page), (False, 0))
                assert (guest.value(va) == value) is (how == secret)
                raw = guest.secret(page * PAGE) if private[page] else guest.word(page * PAGE)
                assert (raw == value) is (not how)
