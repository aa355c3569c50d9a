"""The smallest tests there are: what docs/selftests.md shows, kept working."""

from __future__ import annotations

from errno import EINVAL

from kvmapi.vm import Vm
from vmm.selftests.api import MachineFactory, Subtest, expect_errno, runs_on

ECHO = r"""
#include "ucall.h"

unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	volatile uint64_t *word = (uint64_t *)boot->test_area;

	*word = 0x1122;
	GUEST_ASSERT_EQ(ucall_sync(1, boot->test_area), 7);
	GUEST_ASSERT_EQ(*word, 0x3344);
	return 0;
}
"""


@runs_on("plain", "sw-protected", "sev", "sev-es")
def test_shared_word(machine: MachineFactory) -> None:
    """The host sees what the guest writes into shared memory, and the guest what the host writes."""
    m = machine(ECHO)
    gpa = m.sync(stage=1).args[0]
    m.expect_memory(gpa, (0x1122).to_bytes(8, "little"))
    m.memory.write(gpa, (0x3344).to_bytes(8, "little"))
    m.answer(7)
    m.done()


@runs_on("plain", "sw-protected")
def test_flags(vm: Vm, subtest: Subtest) -> None:
    """A memslot flag that nobody knows is refused, bit by bit."""
    for bit in range(3, 32):
        with subtest(f"bit {bit}"), expect_errno(EINVAL):
            vm.set_user_memory_region(0, 0, 4096, 0, flags=1 << bit)
