"""The history of one ioctl, the one that says which pages are private: each row of kvmapi.abi.dialects answers as its posting did.

May 2022    population of a memfd (upm-v6: no ioctl)            tests/model/test_upm.py
May 2022    KVM_SET_MEMORY_ATTR, SHARED or PRIVATE, pending requests
July 2022   KVM_MEMORY_ENCRYPT_{REG,UNREG}_REGION on GPAs       tests/model/test_upm.py
Dec 2022    KVM_GET_SUPPORTED_MEMORY_ATTRIBUTES, KVM_SET_MEMORY_ATTRIBUTES as _IOWR
July 2023   the same as _IOW, on guest_memfd
Linux 6.8   SET only, as 0xd2
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator
from typing import Any

import pytest

from kvmapi.abi import caps, ioctls, kvm
from kvmapi.abi import dialects as d
from kvmapi.abi.structs import kvm_memory_attributes
from kvmapi.errors import KvmError
from kvmapi.exits import Exit, Hlt, Hypercall, MemoryFault
from tests.conformance.snippets import ALIAS, PAGE, address_of
from tests.model.upm import AT, ENCRYPTED, PAT, Upm, host

pytestmark = pytest.mark.model
PRIVATE = kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE
PAT2 = 0x9999999999999999
SHARE, SECLUDE = d.KVM_MEMORY_ATTR_SHARED, d.KVM_MEMORY_ATTR_PRIVATE

ROWS = {
    "upm-v6": {},
    "attr-2022": {"KVM_SET_MEMORY_ATTR": 0x4018AED2},
    "upm-v7": {"KVM_MEMORY_ENCRYPT_REG_REGION": 0x8010AEBB, "KVM_MEMORY_ENCRYPT_UNREG_REGION": 0x8010AEBC},
    "attr-v10": {"KVM_GET_SUPPORTED_MEMORY_ATTRIBUTES": 0x8008AED2, "KVM_SET_MEMORY_ATTRIBUTES": 0xC020AED3},
    "attr-v11": {"KVM_GET_SUPPORTED_MEMORY_ATTRIBUTES": 0x8008AED2, "KVM_SET_MEMORY_ATTRIBUTES": 0x4020AED3},
    "mainline": {"KVM_SET_MEMORY_ATTRIBUTES": 0x4020AED2},
}
"""The table, once more and by hand."""

SETTERS = {number for row in ROWS.values() for name, number in row.items() if "ENCRYPT" not in name}


def fault(private: bool, gpa: int = AT, number: int = 0) -> Exit:
    return MemoryFault(kvm.KVM_MEMORY_EXIT_FLAG_PRIVATE if private else 0, gpa, PAGE, number)


class Protected(Upm):
    """A guest of a dialect with guest_memfds: the test slot has one, of a SW_PROTECTED VM."""

    def __init__(self, machine: Any) -> None:
        super().__init__(machine, pages=None)
        self.vm.close()
        for vcpu in self.vcpus:
            vcpu.close()
        self.vcpus.clear()
        self.vm = self.system.create_vm(kvm.KVM_X86_SW_PROTECTED_VM)
        self.vm.set_user_memory_region(0, 0, len(self.memory), self.hva)
        self.shared = self.mapping(2)
        self.gmem = self.vm.create_guest_memfd(2 * PAGE)
        self.closing.append(self.gmem)
        self.vm.set_user_memory_region2(10, AT, 2 * PAGE, address_of(self.shared), guest_memfd=self.gmem.fd)
        self.start_long(self.add_vcpu())


def test_the_table() -> None:
    assert list(d.DIALECTS) == list(ROWS)
    for name, row in d.DIALECTS.items():
        assert {call.name: call.number for call in row.calls} == ROWS[name]
        assert all(call.struct is not None and call.words for call in row.calls) and row.when and row.words
    assert d.dialect("mainline") is d.MAINLINE


@pytest.mark.parametrize("dialect", ROWS)
def test_each_kernel_has_its_own_numbers_only(dialect: str) -> None:
    with Upm(host(dialect), pages=None) as guest:
        for number in SETTERS:
            known = number in ROWS[dialect].values()
            assert guest.vm.ioctl_raw(number, 0xBAD000) == -(errno.EFAULT if known else errno.ENOTTY)


@pytest.mark.parametrize(
    ("dialect", "answers"),
    [
        ("attr-2022", {225: 0, 231: 0, 233: 0}),
        ("attr-v10", {225: 1, 231: 0, 233: 0}),
        ("attr-v11", {225: 0, 230: 1, 231: 1, 233: 0, caps.KVM_CAP_GUEST_MEMFD: 1}),
        ("mainline", {225: 0, 230: 0, 231: 1, 233: PRIVATE}),
    ],
)
def test_capabilities(dialect: str, answers: dict[int, int]) -> None:
    with Upm(host(dialect), pages=None) as guest:
        assert {number: guest.system.check_extension(number) for number in answers} == answers


# ---- the idea of May 2022
@pytest.fixture
def idea() -> Iterator[Upm]:
    with Upm(host("attr-2022")) as guest:
        guest.fill(PAT)
        yield guest


def test_the_ioctl_decides_instead_of_population(idea: Upm) -> None:
    idea.memfd.allocate(0, PAGE)
    assert idea.value() == PAT
    idea.vm.set_memory_attr(AT, PAGE, SECLUDE)
    assert idea.value() == 0 and idea.store(PAT2) == Hlt()
    assert idea.word() == PAT and idea.secret() == PAT2
    idea.vm.set_memory_attr(AT, PAGE, SHARE)
    assert idea.value() == PAT
    idea.vm.set_memory_attr(AT, 2 * PAGE, SECLUDE)
    assert idea.value() == PAT2  # nobody punched it


@pytest.mark.parametrize(
    ("gpa", "size", "flags"),
    [(AT, 0, SHARE), (AT + 8, PAGE, SHARE), (AT, 8, SHARE), (AT, (1 << 64) - AT, SECLUDE), (AT, PAGE, 0), (AT, PAGE, 3), (AT, PAGE, 4)],
)
def test_what_the_idea_refuses(idea: Upm, gpa: int, size: int, flags: int) -> None:
    with pytest.raises(KvmError, match="KVM_SET_MEMORY_ATTR") as caught:
        idea.vm.set_memory_attr(gpa, size, flags)
    assert caught.value.errno == errno.EINVAL


def test_no_slot_is_needed_and_ordinary_ones_do_not_care(idea: Upm) -> None:
    idea.vm.set_memory_attr(1 << 40, PAGE, SECLUDE)
    idea.vm.set_memory_attr(0, 2 << 20, SECLUDE)
    assert idea.value(0x100000) == 0


def ask(guest: Upm, attributes: int, result: int | None = 0, pages: int = 1) -> None:
    """The guest's request; user space answers it when `result` says what."""
    exit = guest.say(AT, pages, attributes)
    assert isinstance(exit, Hypercall) and exit.args[:3] == (AT, pages, attributes)
    if result is not None:
        guest.vcpu.answer_hypercall(result)
        assert guest.run() == Hlt()


def test_a_request_is_pending_until_user_space_completes_it(idea: Upm) -> None:
    ask(idea, ENCRYPTED)  # answered, but not done
    assert idea.load() == fault(True)
    assert idea.value(AT + PAGE) == PAT
    idea.vm.set_memory_attr(AT, PAGE, SECLUDE)
    assert idea.run() == Hlt() and idea.value() == 0
    ask(idea, 0, pages=2)
    assert idea.load() == fault(False) and idea.load(AT + PAGE) == fault(False, AT + PAGE)
    idea.vm.set_memory_attr(AT, 2 * PAGE, SHARE)
    assert idea.value() == PAT


def test_a_request_completed_during_the_exit(idea: Upm) -> None:
    ask(idea, ENCRYPTED, None)
    idea.vm.set_memory_attr(AT, PAGE, SECLUDE)
    idea.vcpu.answer_hypercall(0)
    assert idea.run() == Hlt()
    assert idea.value() == 0


def test_a_request_that_is_refused_is_forgotten(idea: Upm) -> None:
    ask(idea, ENCRYPTED, -errno.EPERM)
    assert idea.value() == PAT


def test_user_space_may_decide_otherwise(idea: Upm) -> None:
    ask(idea, ENCRYPTED)
    ask(idea, 0)  # the later request counts
    assert idea.load() == fault(False)
    idea.vm.set_memory_attr(AT, PAGE, SECLUDE)
    assert idea.value() == 0


def test_the_idea_on_an_sev_guest() -> None:
    with Upm(host("attr-2022"), 2) as guest:
        guest.launch()
        guest.fill(PAT)
        ask(guest, ENCRYPTED)
        assert guest.store(PAT2) == fault(True)
        guest.vm.set_memory_attr(AT, PAGE, SECLUDE)
        assert guest.run() == Hlt()
        assert guest.value() == PAT2 and guest.secret() not in (0, PAT2) and guest.word() == PAT
        assert guest.value(ALIAS + AT) == guest.secret()


# ---- v10
def test_v10_writes_back_what_is_left() -> None:
    with Upm(host("attr-v10")) as guest:
        guest.fill(PAT)
        assert guest.vm.supported_memory_attributes() == PRIVATE
        assert guest.vm.set_attributes(AT, PAGE, PRIVATE) == (AT + PAGE, 0)
        assert guest.store(PAT2) == Hlt() and guest.word() == PAT and guest.secret() == PAT2
        assert guest.value(AT + PAGE) == PAT
        guest.vm.set_memory_attributes(AT, PAGE, 0)
        assert guest.value() == PAT
        argument = kvm_memory_attributes(AT, PAGE, d.KVM_MEMORY_ATTRIBUTE_READ, 0)
        assert guest.vm.ioctl_raw(d.KVM_SET_MEMORY_ATTRIBUTES_V10, ctypes.addressof(argument)) == -errno.EINVAL
        assert (argument.address, argument.size) == (AT, PAGE)  # nothing is written back with an error


@pytest.mark.parametrize("attributes", [1, 2, 4, 7, 15, 16])
@pytest.mark.parametrize("dialect", ["attr-v10", "attr-v11", "mainline"])
def test_rights_have_bits_and_no_support(dialect: str, attributes: int) -> None:
    with Upm(host(dialect), pages=None) as guest, pytest.raises(KvmError, match="KVM_SET_MEMORY_ATTRIBUTES") as caught:
        guest.vm.set_memory_attributes(AT, PAGE, attributes)
    assert caught.value.errno == errno.EINVAL


def test_a_v10_page_without_private_memory() -> None:
    with Upm(host("attr-v10")) as guest:
        guest.vm.set_memory_attributes(0x100000, PAGE, PRIVATE)  # of a slot without private half
        assert guest.load(0x100000) == fault(True, 0x100000)
        assert bytes(guest.vcpu.run_map[8:12]) == (38).to_bytes(4, "little") and guest.vcpu.run_map[32] == 1
        guest.vm.set_memory_attributes(0x100000, PAGE, 0)
        assert guest.run() == Hlt()


# ---- v11 and mainline
@pytest.mark.parametrize(("dialect", "reason", "number"), [("attr-v11", 38, 0), ("mainline", 39, errno.EFAULT)])
def test_guest_memfd_and_the_ioctl_on_it(dialect: str, reason: int, number: int) -> None:
    with Protected(host(dialect)) as guest:
        guest.fill(PAT)
        if dialect == "attr-v11":
            assert guest.vm.supported_memory_attributes() == PRIVATE
        assert guest.vm.set_attributes(AT, PAGE, PRIVATE) == (AT, PAGE)  # nothing is written back
        assert guest.store(PAT2) == Hlt() and guest.word() == PAT and guest.value() == PAT2
        guest.vm.set_memory_attributes(0x100000, PAGE, PRIVATE)
        assert guest.load(0x100000) == fault(True, 0x100000, number)
        assert bytes(guest.vcpu.run_map[8:12]) == reason.to_bytes(4, "little") and guest.vcpu.run_map[32] == 8
        guest.vm.set_memory_attributes(AT, PAGE, 0)
        assert guest.value() == PAT


def test_plain_vms_of_v11_have_no_attributes() -> None:
    with Upm(host("attr-v11"), pages=None) as guest:
        assert guest.vm.supported_memory_attributes() == 0
        with pytest.raises(KvmError):
            guest.vm.set_memory_attributes(AT, PAGE, PRIVATE)
        with pytest.raises(KvmError):
            guest.vm.set_private_region(1, AT, PAGE, guest.hva, 0)


def test_mainline_knows_no_get_supported() -> None:
    with Upm(host("mainline"), pages=None) as guest:
        with pytest.raises(KvmError) as caught:
            guest.vm.supported_memory_attributes()
        assert caught.value.errno == errno.ENOTTY
        assert ioctls.KVM_SET_MEMORY_ATTRIBUTES == 0x4020AED2
