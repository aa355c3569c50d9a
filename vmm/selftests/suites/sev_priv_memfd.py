"""The RFC suite for SEV and SEV-ES: `sev_priv_memfd_test`, eight cases, shared memory in pages of 4 KiB and 2 MiB, private memory in 4 KiB.

The test memory is never part of the launch. The guest's own memory is encrypted and measured: in place, or in UPM mode in a private memslot
of its own. Guest and host talk by HLT and a shared page. What guest and host do in each case stands in `vmm.selftests.privmem.cases`.
"""

from __future__ import annotations

from kvmapi.host import Host
from vmm.selftests.api import Case, Subtest, runs_on
from vmm.selftests.privmem.cases import SCENARIOS
from vmm.selftests.privmem.runs import make_rig, run

on_sev = runs_on("sev", "sev-es", dialects=("upm-v6", "upm-v7"))


@on_sev
def test_private_memory_private_access(case: Case, host: Host, subtest: Subtest) -> None:
    """PrivateMemoryPrivateAccess: the shared half does not see what the guest writes to private memory."""
    run(SCENARIOS[0], case, host, subtest)


@on_sev
def test_private_memory_shared_access(case: Case, host: Host, subtest: Subtest) -> None:
    """PrivateMemorySharedAccess: a shared access makes a private page shared, with the host's data."""
    run(SCENARIOS[1], case, host, subtest)


@on_sev
def test_shared_memory_shared_access(case: Case, host: Host, subtest: Subtest) -> None:
    """SharedMemorySharedAccess: host and guest see one memory, without an exit."""
    run(SCENARIOS[2], case, host, subtest)


@on_sev
def test_shared_memory_private_access(case: Case, host: Host, subtest: Subtest) -> None:
    """SharedMemoryPrivateAccess: a private access makes a shared page private."""
    run(SCENARIOS[3], case, host, subtest)


@on_sev
def test_private_shared_access(case: Case, host: Host, subtest: Subtest) -> None:
    """PrivateSharedAccess: private memory, made shared by the host, is used as shared."""
    run(SCENARIOS[4], case, host, subtest)


@on_sev
def test_shared_private_access(case: Case, host: Host, subtest: Subtest) -> None:
    """SharedPrivateAccess: shared memory, made private by the host, is used as private."""
    run(SCENARIOS[5], case, host, subtest)


@on_sev
def test_private_shared_private_access_hypercall(case: Case, host: Host, subtest: Subtest) -> None:
    """PrivateSharedPrivateAccessHyperCall: the guest asks for shared, and for private again."""
    run(SCENARIOS[6], case, host, subtest)


@on_sev
def test_private_shared_access_without_double_allocation(case: Case, host: Host, subtest: Subtest) -> None:
    """PrivateSharedAccessWithoutDoubleAllocation: what is private has no shared half that could be touched."""
    run(SCENARIOS[7], case, host, subtest)


@on_sev
def test_upm_mode(case: Case, host: Host, subtest: Subtest) -> None:
    """KVM_CAP_UNMAPPED_PRIVATE_MEM: each case again, in a guest whose own memory is private too and has left nothing behind."""
    for scenario in SCENARIOS:
        with subtest(scenario.name), make_rig(scenario, case, host, upm=True) as rig:
            scenario.host(rig)
            rig.expect_own_memory_unseen()
