"""A hostile guest, what it costs, and the VM beside it that must not notice.

    with Attack(machine, GUEST, note) as attack:
        attack.bench.done()

While the block runs, every exit is counted. At its end
- the CPU time per exit, the growth of this process's own memory (guest memory is not counted) and what the VMM remembers of the
  guest (console, conversions) must be below a limit; the numbers go to `note`;
- the bystander, a VM of the same type on the same host that was started before, must find its memory, private and shared, as it left
  it, and the host its map, its conversions and the bytes behind its memory.

The limits are wide: they tell a constant from what grows with every exit, on a machine that is busy with other things too.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from vmm.devices import CONSOLE_LIMIT
from vmm.selftests.checks import Failure, check_equal

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.selftests.bench import Bench
    from vmm.selftests.fixtures import MachineFactory

CPU_PER_EXIT, CPU_BESIDE = 0.004, 3.0
"""Seconds: for an exit, the guest's own work before it included, and for what a guest does without leaving."""

GROWTH = 24 << 20
"""Bytes of anonymous memory that one attack may leave: the engine of a vCPU, translated code and the bounded records fit in."""

BYSTANDER_PAGES = 8

BYSTANDER = r"""
#include "paging.h"
#include "ucall.h"

#define PAGES	8
#define WORDS	(PAGES * PAGE_SIZE / 8)

static uint64_t own[WORDS];		/* private where the image is */

static uint64_t value(uint64_t seed, uint64_t word)
{
	return (seed + word) * 0x9e3779b97f4a7c15UL;
}

/* Eight pages of the image, eight shared ones and, where conversions exist, eight that were made private. */
unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	volatile uint64_t *shared = (uint64_t *)boot->test_area, *private = shared + WORDS;
	bool converts = boot->features & FEATURE_MAP_GPA_RANGE && boot->vm_type != VM_PLAIN;

	(void)vcpu;
	paging_start(boot);
	if (converts)
		make_private((uint64_t)private, PAGES);
	for (uint64_t word = 0; word < WORDS; word++) {
		own[word] = value(1, word);
		shared[word] = value(2, word);
		private[word] = value(3, word);
	}
	for (uint64_t round = 0; ucall_sync(1, round, converts); round++) {
		for (uint64_t word = 0; word < WORDS; word++) {
			GUEST_ASSERT_EQ(own[word], value(1, word));
			GUEST_ASSERT_EQ(shared[word], value(2, word));
			GUEST_ASSERT_EQ(private[word], value(3, word));
		}
	}
	return 0;
}
"""


class Bystander:
    """A VM that does nothing wrong. `check` lets it look at its memory, and looks at it from outside."""

    def __init__(self, machine: MachineFactory) -> None:
        self.bench = machine(BYSTANDER)
        self.rounds = 0
        self._sync()
        self._before = self._seen()

    def _sync(self) -> None:
        said = self.bench.sync(stage=1)
        check_equal(said.args[0], self.rounds, "the bystander's count of its rounds")

    def _seen(self) -> dict[str, object]:
        """What the host sees of it, between two runs."""
        bench = self.bench
        return {
            "its memory": bench.memory.read(bench.memory.slots[0].gpa + 0x800000, 2 * BYSTANDER_PAGES * 4096),
            "its map": list(bench.map.ranges(0, 16 << 20)),
            "its conversions": bench.converter.total,
            "its console": bench.console,
        }

    def check(self) -> None:
        """Failure when anything changed, seen from outside or from inside."""
        for what, now in self._seen().items():
            check_equal(now, self._before[what], f"the VM beside the hostile guest: {what}")
        self.bench.answer(1)
        self.rounds += 1
        self._sync()


class Attack:
    """A context manager around a hostile guest's run; see the module. `bench` is its machine."""

    def __init__(self, machine: MachineFactory, guest: str, note: Callable[[str], None], **options: Any) -> None:
        self.bystander = Bystander(machine)
        self.bench: Bench = machine(guest, **options)
        self._note = note
        self._began = 0.0
        self._memory = 0

    def __enter__(self) -> Attack:
        self._memory = own_memory()
        self._began = time.process_time()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None:
            return
        spent, grown = time.process_time() - self._began, own_memory() - self._memory
        exits = sum(self.bench.counts.values())
        kept, records = len(self.bench.devices.console.data), len(self.bench.converter.records)
        self._note(
            f"{exits:,} exits, {spent:.2f} s of CPU ({1e6 * spent / max(exits, 1):.0f} µs each), "
            f"own memory {grown / (1 << 20):+.1f} MiB; "
            f"kept: {kept:,} bytes of console, {records:,} of {self.bench.converter.total:,} conversions"
        )
        if spent > exits * CPU_PER_EXIT + CPU_BESIDE:
            raise Failure(f"{exits} exits of the guest cost {spent:.2f} s of CPU, more than {1000 * CPU_PER_EXIT:g} ms each")
        if grown > GROWTH:
            raise Failure(f"{exits} exits of the guest made this process {grown >> 20} MiB larger, more than {GROWTH >> 20} MiB")
        if kept > CONSOLE_LIMIT:
            raise Failure(f"{kept} bytes of the guest's console output are kept, more than {CONSOLE_LIMIT}")
        self.bystander.check()


def own_memory() -> int:
    """Anonymous memory of this process in bytes: what the VMM and the model take, without guest memory, which is shared."""
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
    raise Failure("/proc/self/status has no line RssAnon")
