"""Everything a test imports (docs/selftests.md): `from vmm.selftests.api import ...`."""

from __future__ import annotations

from vmm.selftests.bench import Background, Bench, Slot
from vmm.selftests.case import Case, Skip, runs_on
from vmm.selftests.checks import Failure, check_equal, check_result, expect_errno, expect_firmware, fail, signal_of, skip
from vmm.selftests.fixtures import Closeable, Fixtures, GuestLoader, Keep, MachineFactory, Note
from vmm.selftests.subtests import Subtest
from vmm.selftests.ucall import Abort, Done, Sync

__all__ = [
    "Abort", "Background", "Bench", "Case", "Closeable", "Done", "Failure", "Fixtures", "GuestLoader", "Keep", "MachineFactory", "Note",
    "Skip", "Slot", "Subtest", "Sync", "check_equal", "check_result", "expect_errno", "expect_firmware", "fail", "runs_on", "signal_of",
    "skip",
]  # fmt: skip
