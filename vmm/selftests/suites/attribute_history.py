"""How user space said that a page is private, from the first proposal to mainline (docs/dialects.md): each posting's ioctl at work.

One guest for all: it does what the host answers, a load, a store or a hypercall, and tells what came of it. Population (upm-v6) and
registration (upm-v7), which decided in between, are what the suites priv_memfd and sev_priv_memfd are about.
"""

from __future__ import annotations

import ctypes
import mmap
from errno import EFAULT, EINVAL, ENOTTY, EPERM
from typing import cast

from kvmapi import dialects
from kvmapi.abi import dialects as d
from kvmapi.abi import kvm
from kvmapi.exit_types import Exit, Hypercall, MemoryFault
from kvmapi.vm import Vm
from vmm.selftests.api import Bench, Case, Keep, MachineFactory, Slot, Subtest, check_equal, check_result, expect_errno, runs_on

AT, PAGE = 0xB0000000, 4096
PRIVATE, SHARED = kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE, 0
LOAD, STORE, MAP, END = range(4)
MINE, YOURS = 0x6666666666666666, 0x9999999999999999
SETTERS = {
    "attr-2022": d.KVM_SET_MEMORY_ATTR,
    "attr-v10": d.KVM_SET_MEMORY_ATTRIBUTES_V10,
    "attr-v11": d.KVM_SET_MEMORY_ATTRIBUTES_V11,
    "mainline": d.MAINLINE.calls[0].number,
}

GUEST = r"""
#include "hypercall.h"
#include "ucall.h"

enum { LOAD, STORE, MAP, END };

unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	uint64_t result = 0;

	for (;;) {
		const uint64_t order = ucall_sync(1, result);           /* what to do: bits 1:0, to which page: bit 2, with what: the rest */
		volatile uint64_t *word = (uint64_t *)(0xB0000000UL + (order >> 2 & 1) * 4096);

		switch (order & 3) {
		case LOAD:
			result = *word;
			break;
		case STORE:
			*word = order >> 3;
			break;
		case MAP:
			result = map_gpa_range((uint64_t)word, 1, order >> 3);
			break;
		default:
			return 0;
		}
	}
}
"""


class Guest:
    """The guest, waiting for an order, and a test slot of two pages with `shared` as its shared half."""

    def __init__(self, machine: MachineFactory, case: Case, keep: Keep) -> None:
        self.shared = keep(mmap.mmap(-1, 2 * PAGE))
        self.m = machine(GUEST, prepare=lambda m: self._add_slot(m, case, keep))
        self.vm = self.m.vm
        self.fill(MINE)
        self.m.sync()

    def _add_slot(self, m: Bench, case: Case, keep: Keep) -> None:
        """Private memory is a guest_memfd, or an inaccessible memfd."""
        if d.dialect(case.dialect).files == "guest_memfd":
            self.slot = m.add_slot(Slot(10, AT, 2 * PAGE, guest_memfd=True))
            self.shared = self.slot.map
            return
        memfd = keep(dialects.PrivateMemfd.create(m.host, 2 * PAGE))
        hva = ctypes.addressof(ctypes.c_char.from_buffer(self.shared))
        cast(dialects.Vm, m.vm).set_private_region(10, AT, 2 * PAGE, hva, memfd.fd)
        m.tables.map(gva=AT, gpa=AT, size=2 * PAGE, private=False)

    def fill(self, word: int) -> None:
        """The first word of both pages, as the host sees them."""
        for page in range(2):
            self.shared[page * PAGE : page * PAGE + 8] = word.to_bytes(8, "little")

    def host_sees(self, word: int, page: int = 0) -> None:
        """The shared half's first word is this."""
        check_equal(bytes(self.shared[page * PAGE : page * PAGE + 8]), word.to_bytes(8, "little"), "the shared half")

    def order(self, what: int, page: int = 0, value: int = 0) -> None:
        """Let the guest do it when it runs next."""
        self.m.answer(what | page << 2 | value << 3)

    def reads(self, word: int, page: int = 0) -> None:
        """A load is served at once, with this."""
        self.order(LOAD, page)
        check_equal(self.m.sync().args[0], word, f"what the guest reads in page {page}")

    def faults(self, private: bool, page: int = 0) -> MemoryFault:
        """A load ends in a memory fault exit, and is waiting then."""
        self.order(LOAD, page)
        return self.again(private, page)

    def again(self, private: bool, page: int = 0) -> MemoryFault:
        """The waiting access ends in a memory fault exit."""
        fault = self.m.until(MemoryFault)
        check_equal((fault.gpa, fault.size, fault.private), (AT + page * PAGE, PAGE, private), "the memory fault")
        return fault

    def asks(self, attributes: int, answer: int | None) -> Exit:
        """MAP_GPA_RANGE of the first page; user space answers, unless that is None."""
        self.order(MAP, value=attributes)
        exit_ = self.m.until(Hypercall)
        check_equal(exit_.args[:3], (AT, 1, attributes), "the hypercall's arguments")
        if answer is not None:
            self.answers(answer)
        return exit_

    def answers(self, result: int) -> None:
        self.m.vcpus[0].answer_hypercall(result)
        check_equal(self.m.sync().args[0], result & (1 << 64) - 1, "the hypercall's result")

    def end(self) -> None:
        self.order(END)
        self.m.done()


@runs_on("plain", dialects=tuple(SETTERS), rungs=("model",))
def test_numbers(vm: Vm, case: Case, subtest: Subtest) -> None:
    """A kernel has its own posting's ioctl and no other's: the numbers of the rest are ENOTTY."""
    for name, number in SETTERS.items():
        with subtest(name):
            check_result(vm.ioctl_raw(number, 0xBAD000), -EFAULT if name == case.dialect else -ENOTTY, f"the setter of {name}")


@runs_on("plain", dialects=("attr-2022",), rungs=("model",))
def test_set_memory_attr(machine: MachineFactory, case: Case, keep: Keep, subtest: Subtest) -> None:
    """KVM_SET_MEMORY_ATTR: SHARED or PRIVATE, and a guest's request is pending until the ioctl completes it."""
    guest = Guest(machine, case, keep)
    vm = cast(dialects.Vm, guest.vm)
    secret, open_ = d.KVM_MEMORY_ATTR_PRIVATE, d.KVM_MEMORY_ATTR_SHARED
    with subtest("flags"):
        for flags in (0, secret | open_, 4):
            with expect_errno(EINVAL):
                vm.set_memory_attr(AT, PAGE, flags)
    with subtest("decides"):
        guest.reads(MINE)
        vm.set_memory_attr(AT, PAGE, secret)
        guest.reads(0)
        guest.reads(MINE, page=1)
        vm.set_memory_attr(AT, PAGE, open_)
        guest.reads(MINE)
    with subtest("pending until complete"):
        guest.asks(kvm.KVM_MAP_GPA_RANGE_ENCRYPTED, 0)
        guest.faults(private=True)
        guest.again(private=True)
        vm.set_memory_attr(AT, PAGE, secret)
        check_equal(guest.m.sync().args[0], 0, "what the guest reads")
    with subtest("completed during the exit"):
        guest.asks(kvm.KVM_MAP_GPA_RANGE_DECRYPTED, None)
        vm.set_memory_attr(AT, PAGE, open_)
        guest.answers(0)
        guest.reads(MINE)
    with subtest("refused"):
        guest.asks(kvm.KVM_MAP_GPA_RANGE_ENCRYPTED, -EPERM)
        guest.reads(MINE)
    guest.end()


@runs_on("plain", dialects=("attr-v10",), rungs=("model",))
def test_v10(machine: MachineFactory, case: Case, keep: Keep, subtest: Subtest) -> None:
    """Rights have bits that nothing supports; what is left to do is written back; an ordinary slot can be declared private."""
    guest = Guest(machine, case, keep)
    vm = cast(dialects.Vm, guest.vm)
    with subtest("supported"):
        check_equal(vm.supported_memory_attributes(), PRIVATE, "the supported attributes")
        for right in (d.KVM_MEMORY_ATTRIBUTE_READ, d.KVM_MEMORY_ATTRIBUTE_WRITE, d.KVM_MEMORY_ATTRIBUTE_EXECUTE):
            with expect_errno(EINVAL):
                vm.set_memory_attributes(AT, PAGE, right)
    with subtest("written back"):
        check_equal(vm.set_attributes(AT, PAGE, PRIVATE), (AT + PAGE, 0), "what is left")
        guest.reads(0)
        guest.reads(MINE, page=1)
    with subtest("there and back"):
        guest.order(STORE, value=7)
        guest.m.sync()
        guest.host_sees(MINE)
        vm.set_memory_attributes(AT, PAGE, SHARED)
        guest.reads(MINE)
    guest.end()


@runs_on("sw-protected", dialects=("attr-v11",), rungs=("model",))
def test_v11(machine: MachineFactory, case: Case, keep: Keep) -> None:
    """On a guest_memfd, with GET_SUPPORTED still there; the memory fault comes without an errno."""
    check_conversion(Guest(machine, case, keep), errno=0)


@runs_on("sw-protected")
def test_mainline(machine: MachineFactory, case: Case, keep: Keep) -> None:
    """What was merged: the memory fault comes with EFAULT, and nothing is written back."""
    check_conversion(Guest(machine, case, keep), errno=EFAULT)


def check_conversion(guest: Guest, errno: int) -> None:
    """A page that becomes private, one that cannot be served, and back."""
    vm = guest.vm
    if isinstance(vm, dialects.Vm) and vm.dialect is not d.MAINLINE:
        check_equal(vm.supported_memory_attributes(), PRIVATE, "the supported attributes")
        check_equal(vm.set_attributes(AT, PAGE, PRIVATE), (AT, PAGE), "the range, which stays as it was")
    vm.set_memory_attributes(AT, PAGE, PRIVATE)
    guest.reads(0)
    guest.order(STORE, value=7)
    guest.m.sync()
    guest.reads(7)
    guest.host_sees(MINE)
    guest.fill(YOURS)
    vm.set_memory_attributes(AT, PAGE, SHARED)
    guest.reads(YOURS)
    vm.set_memory_attributes(AT, 2 * PAGE, PRIVATE)
    if guest.slot.guest_memfd is not None:
        guest.slot.guest_memfd.close()  # private, with nothing behind it
    check_equal(guest.faults(private=True, page=1).errno, errno, "the errno of KVM_RUN")
    vm.set_memory_attributes(AT, 2 * PAGE, SHARED)
    check_equal(guest.m.sync().args[0], YOURS, "what the guest reads")
    guest.end()
