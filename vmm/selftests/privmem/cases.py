"""The eight cases: what the guest does, and below it what the host does. Steps meet at SYNC(stage).

Names, stages and patterns are those of `sev_priv_memfd_test`. Added to it: each case says which conversions it must have cost.

The test memory begins private, with the guest's accesses shared (upm-v6) or private (upm-v7).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmm.selftests.privmem.guest import PAT1, PAT2, PAT3, PAT4
from vmm.selftests.privmem.rig import EXPLICIT, IMPLICIT, Rig


@dataclass(frozen=True)
class Scenario:
    """One case: its number in the guest, its name in the selftest, the host's part. `guarded`: see `Rig`; on SEV only."""

    number: int
    name: str
    guest: str
    host: Callable[[Rig], None]
    guarded: bool = False


PRIVATE_PRIVATE = r"""
	SYNC(0);
	check_sev();
	SETC();
	MARK_PRIVATE();
	write(PAT2);
	SYNC(1);
	READS(PAT2);
"""


def private_private(rig: Rig) -> None:
    """A private access of a private page costs nothing, and the shared half does not see it."""
    rig.sync(0)
    rig.shared.fill(PAT1)
    rig.sync(1)
    rig.shared.expect(PAT1)
    rig.done()
    rig.shared.expect(PAT1)
    rig.expect_conversions()


PRIVATE_SHARED = r"""
	SYNC(0);
	check_sev();
	UNMARK_FIRST();
	READS(PAT1);
	write(PAT2);
	SYNC(1);
"""


def private_shared(rig: Rig) -> None:
    """A shared access of a private page makes it shared, page by page, with what the host had there."""
    rig.sync(0)
    rig.shared.fill(PAT1)
    rig.sync(1)
    rig.shared.expect(PAT2)
    rig.done()
    rig.expect_conversions((IMPLICIT, False))


SHARED_SHARED = r"""
	SYNC(0);
	check_sev();
	UNMARK_FIRST();
	READS(PAT1);
	write(PAT2);
	SYNC(1);
"""


def shared_shared(rig: Rig) -> None:
    """Shared accesses of shared pages: both sides see one memory."""
    rig.sync(0)
    rig.make_all_shared()
    rig.shared.fill(PAT1)
    rig.sync(1)
    rig.shared.expect(PAT2)
    rig.done()
    rig.expect_conversions()


SHARED_PRIVATE = r"""
	SYNC(0);
	check_sev();
	SETC();
	MARK_PRIVATE();
	write(PAT2);
	SYNC(1);
	READS(PAT2);
"""


def shared_private(rig: Rig) -> None:
    """A private access of a shared page makes it private, page by page; the shared half stays as it was."""
    rig.sync(0)
    rig.make_all_shared()
    rig.shared.fill(PAT1)
    rig.sync(1)
    rig.shared.expect(PAT1)
    rig.done()
    rig.expect_conversions((IMPLICIT, True))


PRIVATE_THEN_SHARED = r"""
	SYNC(0);
	check_sev();
	SETC();
	MARK_PRIVATE();
	write(PAT2);
	SYNC(1);
	READS(PAT2);
	SYNC(2);
	CLRC();
	UNMARK();
	write(PAT2);
	SYNC(3);
	READS(PAT2);
"""


def private_then_shared(rig: Rig) -> None:
    """Pages used as private are made shared by the host, and then used as shared."""
    rig.sync(0)
    rig.shared.fill(PAT1)
    rig.sync(1)
    rig.shared.expect(PAT1)
    rig.sync(2)
    rig.make_all_shared()
    rig.sync(3)
    rig.shared.expect(PAT2)
    rig.done()
    rig.expect_conversions()


SHARED_THEN_PRIVATE = r"""
	SYNC(0);
	check_sev();
	UNMARK_FIRST();
	READS(PAT1);
	write(PAT2);
	SYNC(1);
	SETC();
	MARK_PRIVATE();
	write(PAT1);
	SYNC(1);	/* as in the original, where a stage 2 exists and is not sent */
	READS(PAT1);
"""


def shared_then_private(rig: Rig) -> None:
    """Pages used as shared are made private by the host, and then used as private."""
    rig.sync(0)
    rig.make_all_shared()
    rig.shared.fill(PAT1)
    for _ in range(2):  # making private what is private changes nothing
        rig.sync(1)
        rig.shared.expect(PAT2)
        rig.make_all_private()
    rig.done()
    rig.shared.expect(PAT2)
    rig.expect_conversions()


BY_HYPERCALL = r"""
	SYNC(0);
	check_sev();
	SETC();
	MARK_PRIVATE();
	write(PAT2);
	SYNC(1);
	READS(PAT2);
	MAP_SHARED();
	CLRC();
	UNMARK();
	READS(PAT1);
	write(PAT2);
	SYNC(2);
	READS(PAT2);
	SETC();
	MAP_PRIVATE();
	MARK_PRIVATE();
	write(PAT1);
	SYNC(3);
	READS(PAT1);
"""


def by_hypercall(rig: Rig) -> None:
    """The guest asks: private to shared, where the host's data is found again, and back."""
    rig.sync(0)
    rig.shared.fill(PAT1)
    rig.sync(1)
    rig.shared.expect(PAT1)
    rig.sync(2)
    rig.shared.expect(PAT2)
    rig.sync(3)
    rig.shared.expect(PAT2)
    rig.done()
    rig.shared.expect(PAT2)
    rig.expect_conversions((EXPLICIT, False), (EXPLICIT, True))


NO_DOUBLE_ALLOCATION = r"""
	check_sev();
	SETC();
	MARK_PRIVATE();
	write(PAT1);
	READS(PAT1);
	MAP_SHARED();
	CLRC();
	UNMARK();
	write(PAT2);
	SYNC(1);
	READS(PAT1);
	MAP_PRIVATE();
	SETC();
	MARK_PRIVATE();
	write(PAT2);
	READS(PAT2);
	MAP_SHARED();
	CLRC();
	UNMARK();
	write(PAT3);
	SYNC(2);
	READS(PAT4);
"""


def no_double_allocation(rig: Rig) -> None:
    """While pages are private their shared half is out of bounds for everybody, KVM included."""
    rig.sync(1)
    rig.shared.expect(PAT2)
    rig.shared.fill(PAT1)
    rig.sync(2)
    rig.shared.expect(PAT3)
    rig.shared.fill(PAT4)
    rig.done()
    rig.expect_conversions((EXPLICIT, False), (EXPLICIT, True), (EXPLICIT, False))


SCENARIOS = (
    Scenario(0, "PrivateMemoryPrivateAccess", PRIVATE_PRIVATE, private_private),
    Scenario(1, "PrivateMemorySharedAccess", PRIVATE_SHARED, private_shared),
    Scenario(2, "SharedMemorySharedAccess", SHARED_SHARED, shared_shared),
    Scenario(3, "SharedMemoryPrivateAccess", SHARED_PRIVATE, shared_private),
    Scenario(4, "PrivateSharedAccess", PRIVATE_THEN_SHARED, private_then_shared),
    Scenario(5, "SharedPrivateAccess", SHARED_THEN_PRIVATE, shared_then_private),
    Scenario(6, "PrivateSharedPrivateAccessHyperCall", BY_HYPERCALL, by_hypercall),
    Scenario(7, "PrivateSharedAccessWithoutDoubleAllocation", NO_DOUBLE_ALLOCATION, no_double_allocation, guarded=True),
)
