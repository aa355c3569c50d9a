"""The machine under test: ucalls, waits, slots and mappings, on the model; and on every VM type it can have."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from kvmapi.abi import kvm
from kvmapi.exit_types import Exit, Hlt, Hypercall, MemoryFault
from kvmapi.model.host import ModelHost
from kvmapi.vcpu import Vcpu
from tests.conftest import PATIENCE
from vmm.selftests.api import Bench, Case, Done, Failure, Fixtures, MachineFactory, Slot, Sync

pytestmark = [pytest.mark.model, pytest.mark.gcc]

MAIN = """
#include "ucall.h"
#include "hypercall.h"
%s
unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
    %s
}
"""

Make = Callable[..., MachineFactory]


def guest(body: str, before: str = "") -> str:
    """A guest whose guest_main() is `body`."""
    return MAIN % (before, body)


@pytest.fixture
def on() -> Iterator[Make]:
    """on("sev") gives the fixture `machine` of a test of that type."""
    made: list[Fixtures] = []

    def make(type: str = "plain") -> MachineFactory:
        made.append(Fixtures(Case(type, "mainline", "model")))
        return made[-1].machine

    yield make
    for fixtures in made:
        fixtures.close()


@pytest.mark.parametrize("type", ["plain", "sw-protected", "sev"])
def test_ucalls_carry_numbers_both_ways(on: Make, type: str) -> None:
    m = on(type)(guest("GUEST_ASSERT_EQ(ucall_sync(3, 1, 2, 0xffffffffffffffff, 4, 5), 0x8000000000000001); ucall_done(); return 0;"))
    assert m.sync(stage=3) == Sync(3, (1, 2, (1 << 64) - 1, 4, 5))
    m.answer((1 << 63) + 1)
    m.done()
    m.done()  # guest_main has returned 0


def test_an_answer_is_good_once(on: Make) -> None:
    m = on()(guest("ucall_sync(1); GUEST_ASSERT_EQ(ucall_sync(2), 0); return 0;"))
    m.sync(1)
    m.answer(9)
    m.sync(2)
    m.done()


def test_ucalls_by_halt(on: Make) -> None:
    m = on()("#define UCALL_HLT\n" + guest("ucall_sync(1, 7); GUEST_ASSERT_EQ(5, 6); return 0;"))
    assert m.sync(1).args[0] == 7
    assert m.counts["IO"] == 0
    with pytest.raises(Failure, match=r"gave up in line \d+, with \['0x5', '0x6'"):
        m.next()


def test_a_halt_is_a_ucall_only_if_the_guest_said_something_new(on: Make) -> None:
    m = on()(guest("ucall_sync(1); guest_halt();"))
    m.sync(1)
    assert m.until(Hlt) == Hlt()


def test_every_vcpu_has_a_channel(on: Make) -> None:
    text = guest(
        "ucall_sync(1); return 0;",
        "void guest_secondary(const struct boot_info *b, unsigned v) { (void)b; ucall_sync_on(v, 10 + v); ucall_done_on(v); }",
    )
    m = on()(text, vcpus=3)
    assert m.next(2) == Sync(12, (0, 0, 0, 0, 0), 2)
    assert m.next(1) == Sync(11, (0, 0, 0, 0, 0), 1)
    m.sync(1)
    m.done(2)
    assert m.next(1) == Done(1)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("GUEST_ASSERT(boot == 0); return 0;", r"exit code 1; the guest printed: check failed: guest.c:\d+: boot == 0"),
        ("GUEST_ASSERT_EQ(boot->vcpus, 0x20); return 0;", r"boot->vcpus is 0x1, expected 0x20 \(0x20\)"),
        ("ucall_abort(7, 8); return 0;", r"the guest gave up in line \d+, with \['0x7', '0x8'"),
        ("return 3;", "the guest ended with exit code 3"),
        ('asm volatile("ud2"); return 0;', "exit code 127; the guest printed: guest exception: vector 6"),
        ('print("so far"); guest_halt();', "vCPU 0 halted without a word; the guest printed: so far"),
    ],
)
def test_a_guest_that_fails_fails_the_test_with_its_words(on: Make, body: str, said: str) -> None:
    with pytest.raises(Failure, match=said):
        on()(guest(body)).done()


def test_the_wrong_ucall_is_a_failure(on: Make) -> None:
    text = guest("ucall_sync(1); ucall_sync(2); return 0;")
    with pytest.raises(Failure, match=r"expected SYNC 2, the guest sent Sync\(stage=1"):
        on()(text).sync(2)
    with pytest.raises(Failure, match="expected DONE"):
        on()(text).done()
    with pytest.raises(Failure, match="expected an exit MemoryFault, the guest sent"):
        on()(text).until(MemoryFault)


def test_every_wait_ends(on: Make) -> None:
    m = on()(guest("ucall_sync(1); for (;;) ;"))
    m.sync(1)
    m.patience = 0.2
    began = time.monotonic()
    with pytest.raises(Failure, match=r"vCPU 0 did not get there within 0.2 s"):
        m.done()
    assert time.monotonic() - began < 3 * PATIENCE
    with pytest.raises(Failure, match="did not get there"):  # and the machine can be asked again
        m.step()


def test_until_leaves_the_exit_unanswered_and_step_sees_every_one(on: Make) -> None:
    m = on()(guest('print("x"); GUEST_ASSERT_EQ(map_gpa_range(boot->test_area, 1, 0), 5); return 0;'))
    exit = m.until(Hypercall)
    assert exit.nr == kvm.KVM_HC_MAP_GPA_RANGE and exit.args[0] == 0x800000 and m.console == "x"
    m.vcpus[0].answer_hypercall(5)
    assert m.step().name == "IO"


def test_handlers_come_first_and_exits_are_counted(on: Make) -> None:
    m = on()(
        guest(
            "GUEST_ASSERT_EQ(map_gpa_range(boot->test_area, 1, 0), 77); GUEST_ASSERT_EQ(map_gpa_range(boot->test_area, 1, 0), 0); return 0;"
        )
    )
    seen: list[Exit] = []

    def first(vcpu: Vcpu, exit: Exit) -> bool:
        if not isinstance(exit, Hypercall) or seen:
            return False
        seen.append(exit)
        vcpu.answer_hypercall(77)
        return True

    m.handlers.append(first)
    m.done()
    m.expect_exits(HYPERCALL=2, IO=1)
    with pytest.raises(Failure, match=r"exits \{'HYPERCALL': 2\}, expected \{'HYPERCALL': 1\}"):
        m.expect_exits(HYPERCALL=1)
    assert m.converter.total == 1


def test_conversions_are_made_and_can_be_asserted(on: Make) -> None:
    body = "GUEST_ASSERT_EQ(map_gpa_range(boot->test_area + 0x1000, 1, KVM_MAP_GPA_RANGE_ENCRYPTED), 0); return 0;"
    m = on("sw-protected")(guest(body))
    m.done()
    m.expect_map(0x801000, 0x1000, "private")
    m.expect_map(0x802000, 0x1000, "shared")
    with pytest.raises(Failure, match=r"\[0x800000, 0x803000\) should be shared: \[0x801000, 0x802000\) private"):
        m.expect_map(0x800000, 0x3000, "shared")
    with pytest.raises(Failure, match="has no memslot"):
        m.expect_map(0x40000000, 0x1000, "shared")


def test_console_and_memory_assertions(on: Make) -> None:
    m = on()(guest('print("one two"); *(volatile uint64_t *)boot->test_area = 0x55; return 0;'))
    m.done()
    m.expect_console("one", "two")
    with pytest.raises(Failure, match="the console lacks 'one'"):
        m.expect_console("two", "one")
    m.expect_memory(0x800000, b"\x55\0\0")
    with pytest.raises(Failure, match=r"the host's view of \[0x800000, 0x800002\): 1 of 2 bytes differ"):
        m.expect_memory(0x800000, b"\x55\1")


@pytest.mark.parametrize("type", ["plain", "sw-protected", "sev"])
def test_slots_of_a_test_are_mapped_where_it_says(on: Make, type: str) -> None:
    body = """
        volatile uint64_t *here = (uint64_t *)0xb0000000, *there = (uint64_t *)0x7f0000001000;
        GUEST_ASSERT_EQ(*here, 0x11);
        *there = 0x22;
        GUEST_ASSERT_EQ(*there, 0x22);
        return 0;"""
    slots = [Slot(10, 0xB0000000, 0x200000, page=0x200000), Slot(11, 0xC0000000, 0x2000, gva=0x7F0000000000)]
    m = on(type)(guest(body), slots=slots)
    m.memory.write(0xB0000000, b"\x11")
    m.done()
    m.expect_memory(0xC0001000, b"\x22\0")
    m.expect_map(0xB0000000, 0x200000, "shared")


def test_a_private_slot_of_a_sev_guest_shows_the_host_no_plaintext(on: Make) -> None:
    m = on("sev")(
        guest("*(volatile uint64_t *)0xb0000000 = 0x1122334455667788; ucall_sync(1); return 0;"),
        slots=[Slot(10, 0xB0000000, 0x1000, private=True)],
    )
    m.sync(1)
    assert m.memory.read(0xB0000000, 8) not in (bytes(8), (0x1122334455667788).to_bytes(8, "little"))
    m.expect_map(0xB0000000, 0x1000, "private")
    assert m.launch is not None and m.launch.match


def test_prepare_is_called_before_the_launch_and_after_the_vcpus(on: Make) -> None:
    def prepare(m: Bench) -> None:
        assert m.launch is None and len(m.vcpus) == 1
        m.tables.map(0x7F0000000000, 0x800000, 0x1000, private=False)

    m = on("sev")(guest("*(volatile uint64_t *)0x7f0000000000 = 5; return 0;"), prepare=prepare)
    m.done()
    m.expect_memory(0x800000, b"\5")


def test_a_guest_runs_in_the_background_while_the_test_goes_on(on: Make) -> None:
    m = on()(guest("volatile uint64_t *go = (uint64_t *)boot->test_area; ucall_sync(1); while (!*go) ; return 0;"))
    m.sync(1)
    with m.background() as run:
        assert run.running
        with pytest.raises(ValueError, match="vCPU 0 is run by another thread"):
            _wait_until_busy(m)
        m.memory.write(0x800000, b"\1")
        run.result()
    assert not run.running


def _wait_until_busy(m: Bench) -> None:
    """Ask for the vCPU until the other thread has it."""
    for _ in range(1000):
        m._watch.enter(0, 1)
        m._watch.leave(0)
        time.sleep(0.001)


def test_a_background_run_ends_with_its_block_and_its_failure_is_raised(on: Make) -> None:
    m = on()(guest("return 9;"))
    with pytest.raises(Failure, match="exit code 9"), m.background():
        pass
    spinning = on()(guest("for (;;) ;"), patience=60 * PATIENCE)
    began = time.monotonic()
    with pytest.raises(KeyError, match="the test's own"), spinning.background():
        raise KeyError("the test's own")
    assert time.monotonic() - began < 10 * PATIENCE


def test_a_plain_halt_can_be_waited_for(on: Make) -> None:
    assert on()(guest("guest_halt();")).until(Hlt) == Hlt()


def test_bundled_guests_run_whole(on: Make) -> None:
    m = on("sev")("hello", vcpus=2)
    assert m.run(10 * PATIENCE).result == "pass"


@pytest.mark.usefixtures("no_leaks")
def test_nothing_is_left_behind() -> None:
    _ = ModelHost  # the engine is there before the test looks
    with Fixtures(Case("sw-protected", "mainline", "model")) as fixtures:
        m = fixtures.machine(guest("for (;;) ;"), patience=0.1, slots=[Slot(10, 0xB0000000, 0x2000, guest_memfd=True)])
        with pytest.raises(Failure):
            m.done()
        fixtures.get("vm")
        del m
