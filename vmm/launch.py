"""The measured launch of a SEV guest, as its owner would want it: every step by us, every number checked against our own.

1. INIT2, right after the VM exists and before it has vCPUs.
2. When memory holds image and boot pages: pin every memslot (KVM_MEMORY_ENCRYPT_REG_REGION).
3. An owner's session for this platform: keys that only the owner and the firmware know (`kvmapi.session`).
4. LAUNCH_START; LAUNCH_UPDATE_DATA for everything the guest starts with, in ascending GPA order, in runs of pages that touch;
   LAUNCH_MEASURE.
5. The expected MAC from our own digest; both are reported, whether they match or not. LAUNCH_FINISH only when they match: a guest that is
   not what it should be does not run.

Measured is what the guest relies on: image with its zeroed .bss, tables, boot info, stacks, TSSs. Not measured, and therefore garbage to
the guest until it writes it: the rest of private memory. Not measured and shared from the start: the shared page and the test area.

The host could lie to all of this; the owner's protection is that it cannot make `match` true for other bytes without the owner's key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from kvmapi.launch import Launch
from kvmapi.measurement import LaunchDigest
from kvmapi.sev import SevPlatform
from vmm import boot
from vmm.report import LaunchReport

if TYPE_CHECKING:
    from kvmapi.host import Host
    from kvmapi.vm import Vm
    from vmm.gpamap import GpaMap
    from vmm.memory import GuestMemory

POLICY_NODBG, POLICY_NOKS = 1 << 0, 1 << 1
DEFAULT_POLICY = POLICY_NODBG | POLICY_NOKS


class SevLaunch:
    """The launch of one VM; `report` is there after `run`. Holds /dev/sev open until `close`."""

    def __init__(self, host: Host, vm: Vm, policy: int | None) -> None:
        """Open the platform and initialise the VM; raises KvmError or HostError."""
        self.vm = vm
        self.policy = DEFAULT_POLICY if policy is None else policy
        self.platform = SevPlatform(host)
        try:
            self._launch = Launch(vm, self.platform).init2()
        except BaseException:
            self.platform.close()
            raise

    def close(self) -> None:
        """Close /dev/sev; the guest runs on. Safe to call twice."""
        self.platform.close()

    def pin(self, memory: GuestMemory) -> None:
        """Pin every memslot; raises KvmError with ENOMEM when RLIMIT_MEMLOCK is too low."""
        for slot in memory.slots:
            self.vm.register_enc_region(slot.hva, slot.size)

    def run(self, memory: GuestMemory, pages: Mapping[int, bytes]) -> LaunchReport:
        """Launch with `pages` (by GPA), which are in `memory` already. Raises KvmError; a wrong measurement is in the report's `match`."""
        from kvmapi.session import OwnerSession

        pdh, _chain = self.platform.pdh_cert_export()
        owner = OwnerSession.create(pdh, self.policy)
        started = self._launch.start(self.policy, owner.dh_cert, owner.session)
        digest = LaunchDigest()
        for gpa, size in runs(pages):
            started.update_data(memory.hva(gpa, size), size)
            for at in range(gpa, gpa + size, boot.PAGE):
                digest.update_data(pages[at])
        measured = started.measure()
        status = self.platform.status()
        version = {"api_major": status.api_major, "api_minor": status.api_minor, "build": status.build}
        expected = owner.expected_measure(digest.digest(), measured.nonce, **version)
        match = owner.verify(measured.measure, digest.digest(), measured.nonce, **version)
        if match:
            measured.finish()
        return LaunchReport(self.policy, digest.digest(), measured.measure, measured.nonce, expected, match)


def runs(pages: Mapping[int, bytes]) -> Iterator[tuple[int, int]]:
    """The pages as runs that touch, `(gpa, size)` in bytes, ascending: fewer commands, the same digest."""
    start = end = -1
    for gpa in sorted(pages):
        if gpa != end:
            if start >= 0:
                yield start, end - start
            start = gpa
        end = gpa + boot.PAGE
    if start >= 0:
        yield start, end - start


def mark_private(map: GpaMap, memory: GuestMemory) -> None:
    """The map of a SEV guest at its start: all private, but the shared page and the test area."""
    for slot in memory.slots:
        map.set_range(slot.gpa, slot.size, private=True)
    map.set_range(boot.SHARED_PAGE, boot.PAGE, private=False)
    map.set_range(boot.TEST_AREA, boot.TEST_SIZE, private=False)
