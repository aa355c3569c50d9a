"""What the eight cases do not ask: answers of the hypercall's test bits, a range cleared in part, what is left after a hole was punched,
what memory begins with, and pages that change under a guest that has them mapped. Written as `cases` are; the numbers go on.
"""

from __future__ import annotations

from errno import EINVAL

from vmm.selftests.checks import check_equal
from vmm.selftests.privmem.cases import Scenario
from vmm.selftests.privmem.guest import PAT1, PAT2, PAT3, TEST_GPA
from vmm.selftests.privmem.rig import IMPLICIT, Rig
from vmm.selftests.privmem.shared import PAGE_4K

ANSWERS = r"""
	const uint64_t none = 0x100000000000UL, own = 0x100000UL;	/* addresses without memory, and with the image */

	ucall_sync(0, map_gpa_range(TEST_GPA + 1, 1, MARK), map_gpa_range(TEST_GPA, ~0UL, MARK),
		map_gpa_range(TEST_GPA + 8, 1, CLR), map_gpa_range(TEST_GPA, ~0UL, CLR), map_gpa_range(TEST_GPA + 1, 1, 0));
	ucall_sync(1, map_gpa_range(TEST_GPA, 0, MARK), map_gpa_range(TEST_GPA, 0, CLR), map_gpa_range(none, 1, MARK),
		map_gpa_range(own, 1, MARK), map_gpa_range(TEST_GPA + PAGE_SIZE, pages, MARK));
	ucall_sync(2, map_gpa_range(TEST_GPA, pages, MARK), map_gpa_range(TEST_GPA, pages, MARK | KVM_MAP_GPA_RANGE_ENCRYPTED),
		map_gpa_range(TEST_GPA, pages, CLR), map_gpa_range(TEST_GPA, pages, CLR), 0);
"""


def answers(rig: Rig) -> None:
    """Ranges that are none are refused; one range per vCPU may be any, a bitmap per slot knows its slots. Nothing of it exits."""
    refused = (1 << 64) - EINVAL
    check_equal(rig.sync(0).args, (refused,) * 5, "answers to ranges that are none")
    check_equal(rig.sync(1).args, (refused if rig.by_region else 0,) * 5, "answers to ranges without pages, and outside private slots")
    check_equal(rig.sync(2).args, (0,) * 5, "answers to ranges of a private slot")
    rig.done()
    rig.expect_conversions()
    rig.expect_exits(HYPERCALL=0)


CLEARED_IN_PART = r"""
	SYNC(0);
	MARK_PRIVATE();
	HYPERCALL(TEST_GPA + PAGE_SIZE, 1, CLR);
	write(PAT2);
	SYNC(1);
	READS(PAT2);
"""


def cleared_in_part(rig: Rig) -> None:
    """CLR takes one page out of what is marked: the other stays private."""
    rig.sync(0)
    rig.shared.fill(PAT1)
    rig.sync(1)
    check_equal(rig.conversions, [(IMPLICIT, False, TEST_GPA + PAGE_4K, PAGE_4K)], "conversions")
    check_equal(rig.shared.read()[: PAGE_4K + 8], PAT1.to_bytes(8, "little") * 512 + PAT2.to_bytes(8, "little"), "shared memory")
    rig.done()


PUNCHED = r"""
	SYNC(0);
	SETC();
	MARK_PRIVATE();
	write(PAT2);
	SYNC(1);
	GUEST_ASSERT(!found(PAT2));
	if (!boot->c_mask)
		READS(0);
"""


def punched(rig: Rig) -> None:
    """Private memory that was given back and taken again has forgotten: zeroes, which an encrypted guest reads as garbage."""
    rig.sync(0)
    rig.shared.fill(PAT2)
    rig.sync(1)
    rig.make_all_shared()
    rig.make_all_private()
    rig.done()
    rig.expect_conversions()


BEGINS_WITH = r"""
	uint64_t expected;

	MARK_PRIVATE();
	expected = ucall_sync(0);
	READS(expected);
	SYNC(1);
	READS(expected);
"""


def begins_with(rig: Rig) -> None:
    """Private memory takes over what the shared half holds if its region is registered before the guest ran, and only then."""
    rig.shared.fill(PAT1)
    rig.make_all_private()
    rig.sync(0)
    rig.answer(PAT1 if rig.by_region else 0)
    rig.shared.fill(PAT3)
    rig.sync(1)
    rig.make_all_private()
    rig.done()
    rig.shared.expect(PAT3)
    rig.expect_conversions()


TAKEN_AWAY = r"""
	SYNC(0);
	UNMARK_FIRST();
	READS(PAT1);
	SYNC(1);
	READS(PAT1);
	READS(PAT1);	/* without a fault in between: all of it is mapped now */
	SETC();
	MARK_PRIVATE();
	GUEST_ASSERT(!found(PAT1));
	write(PAT2);
	SYNC(2);
	write(PAT3);
	SYNC(3);
	READS(PAT3);
"""


def taken_away(rig: Rig) -> None:
    """What the guest has just used as shared becomes private, and the other way round: its next access is noticed all the same."""
    rig.sync(0)
    rig.make_all_shared()
    rig.shared.fill(PAT1)
    rig.sync(1)
    rig.make_all_private()
    rig.sync(2)
    rig.expect_conversions((IMPLICIT, False), (IMPLICIT, True))
    rig.shared.expect(PAT1)
    rig.make_all_shared()
    rig.sync(3)
    rig.done()
    rig.expect_conversions((IMPLICIT, False), (IMPLICIT, True), (IMPLICIT, True))
    rig.shared.expect(PAT1)


ANSWERED = Scenario(8, "HypercallAnswers", ANSWERS, answers)
CLEARED = Scenario(9, "ClearedInPart", CLEARED_IN_PART, cleared_in_part)
FORGETS = Scenario(10, "PunchedMemoryForgets", PUNCHED, punched)
BEGINS = Scenario(11, "BeginsWith", BEGINS_WITH, begins_with)
TAKEN = Scenario(12, "TakenAway", TAKEN_AWAY, taken_away)
BEYOND = (ANSWERED, CLEARED, FORGETS, BEGINS, TAKEN)
