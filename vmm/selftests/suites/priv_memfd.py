"""The RFC suite without encryption: `priv_memfd_test` on VMs of type plain, seven cases (the eighth is for SEV only).

Private is what the memfd holds and what accesses the guest has marked so; there is no C-bit. Guest and host talk by a port. What guest and
host do in each case stands in `vmm.selftests.privmem.cases`.
"""

from __future__ import annotations

from kvmapi.host import Host
from vmm.selftests.api import Case, Subtest, runs_on
from vmm.selftests.privmem.cases import SCENARIOS
from vmm.selftests.privmem.runs import run

on_plain = runs_on("plain", dialects=("upm-v6", "upm-v7"))


@on_plain
def test_private_memory_private_access(case: Case, host: Host, subtest: Subtest) -> None:
    """PrivateMemoryPrivateAccess: the shared half does not see what the guest writes to private memory."""
    run(SCENARIOS[0], case, host, subtest)


@on_plain
def test_private_memory_shared_access(case: Case, host: Host, subtest: Subtest) -> None:
    """PrivateMemorySharedAccess: a shared access makes a private page shared, with the host's data."""
    run(SCENARIOS[1], case, host, subtest)


@on_plain
def test_shared_memory_shared_access(case: Case, host: Host, subtest: Subtest) -> None:
    """SharedMemorySharedAccess: host and guest see one memory, without an exit."""
    run(SCENARIOS[2], case, host, subtest)


@on_plain
def test_shared_memory_private_access(case: Case, host: Host, subtest: Subtest) -> None:
    """SharedMemoryPrivateAccess: a private access makes a shared page private."""
    run(SCENARIOS[3], case, host, subtest)


@on_plain
def test_private_shared_access(case: Case, host: Host, subtest: Subtest) -> None:
    """PrivateSharedAccess: private memory, made shared by the host, is used as shared."""
    run(SCENARIOS[4], case, host, subtest)


@on_plain
def test_shared_private_access(case: Case, host: Host, subtest: Subtest) -> None:
    """SharedPrivateAccess: shared memory, made private by the host, is used as private."""
    run(SCENARIOS[5], case, host, subtest)


@on_plain
def test_private_shared_private_access_hypercall(case: Case, host: Host, subtest: Subtest) -> None:
    """PrivateSharedPrivateAccessHyperCall: the guest asks for shared, and for private again."""
    run(SCENARIOS[6], case, host, subtest)
