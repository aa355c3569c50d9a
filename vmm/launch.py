"""The measured launch of a SEV guest, as its owner would want it: every step by us, every number checked against our own.

1. INIT2, right after the VM exists and before it has vCPUs.
2. When memory holds image and boot pages: pin every memslot (KVM_MEMORY_ENCRYPT_REG_REGION).
3. An owner's session for this platform: keys that only the owner and the firmware know (`kvmapi.session`).
4. LAUNCH_START; LAUNCH_UPDATE_DATA for everything the guest starts with, in ascending GPA order, in runs of pages that touch, a
   large run in chunks; for SEV-ES LAUNCH_UPDATE_VMSA; LAUNCH_MEASURE.
5. The expected MAC from our own digest; both are reported, whether they match or not. LAUNCH_FINISH only when they match: a guest that is
   not what it should be does not run.
6. Before LAUNCH_FINISH, and only for a guest that matched: the owner's secret, sealed and put into the secret page (LAUNCH_SECRET).

Measured is what the guest relies on: image with its zeroed .bss, tables, boot info, stacks, TSSs. Not measured, and therefore garbage to
the guest until it writes it: the rest of private memory. Not measured and shared from the start: the shared page, the test area, and
the GHCB pages of an SEV-ES guest.

The host could lie to all of this; the owner's protection is that it cannot make `match` true for other bytes without the owner's key.
Here owner and host are one process: the keys live in one local variable of `run`, and the secret leaves it sealed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from kvmapi.launch import Launch
from kvmapi.measurement import LaunchDigest
from kvmapi.sev import SevPlatform
from vmm import boot
from vmm.measure import regions, runs, vmsas
from vmm.report import LaunchReport

if TYPE_CHECKING:
    from kvmapi.host import Host
    from kvmapi.launch import Measured
    from kvmapi.session import OwnerSession
    from kvmapi.vm import Vm
    from vmm.gpamap import GpaMap
    from vmm.memory import GuestMemory

POLICY_NODBG, POLICY_NOKS, POLICY_ES = 1 << 0, 1 << 1, 1 << 2
CHUNK = 16 << 20
"""Bytes of one LAUNCH_UPDATE_DATA: between two of them there is progress to show, and Ctrl-C to notice."""

Contents = Mapping[int, bytes | memoryview]
Progress = Callable[[int, int], None]
"""Called with the bytes that are encrypted and measured so far, and with all that will be."""


def default_policy(type: str) -> int:
    """No debugging and no key sharing; a SEV-ES guest also says that it must be one."""
    return POLICY_NODBG | POLICY_NOKS | (POLICY_ES if type == "sev-es" else 0)


class SevLaunch:
    """The launch of one VM of `type` sev or sev-es. Holds /dev/sev open until `close`."""

    def __init__(self, host: Host, vm: Vm, policy: int | None, type: str = "sev") -> None:
        """Open the platform and initialise the VM; raises KvmError or HostError."""
        self.vm = vm
        self.policy = default_policy(type) if policy is None else policy
        self.es = type == "sev-es"
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

    def run(
        self,
        memory: GuestMemory,
        contents: Contents,
        areas: Sequence[bytes] = (),
        *,
        secret: bytes | bytearray | None = None,
        record: bool = False,
        progress: Progress | None = None,
    ) -> LaunchReport:
        """Launch with `contents` (whole pages by GPA), which are in `memory` already.

        `areas`: of an SEV-ES guest, the VMSA that each vCPU should get from the registers it was given (`kvmapi.vmsa`).
        `secret`: 1 to `boot.MAX_SECRET` bytes for the secret page, given to the guest only if its measurement is the expected one.
        `record`: hash every region, page and VMSA for the report. Raises KvmError; a wrong measurement is in the report's `match`.
        """
        from kvmapi.session import OwnerSession

        pdh, _chain = self.platform.pdh_cert_export()
        owner = OwnerSession.create(pdh, self.policy)
        try:
            started = self._launch.start(self.policy, owner.dh_cert, owner.session)
            self._update(started.update_data, memory, contents, progress)
            if self.es:
                started.update_vmsa()
            digest = expected_digest(contents, areas)
            measured = started.measure()
            status = self.platform.status()
            version = {"api_major": status.api_major, "api_minor": status.api_minor, "build": status.build}
            expected = owner.expected_measure(digest, measured.nonce, **version)
            match = owner.verify(measured.measure, digest, measured.nonce, **version)
            if match:
                if secret is not None:
                    _give_secret(owner, measured, memory, secret)
                measured.finish()
            return LaunchReport(
                self.policy, digest, measured.measure, measured.nonce, expected, match,
                version=(status.api_major, status.api_minor, status.build),
                regions=tuple(regions(contents)) if record else None,
                vmsas=tuple(vmsas(areas)) if record else None,
            )  # fmt: skip
        finally:
            owner.forget()

    def _update(self, update: Callable[[int, int], None], memory: GuestMemory, contents: Contents, progress: Progress | None) -> None:
        """LAUNCH_UPDATE_DATA for every run of pages, in chunks."""
        total, done = sum(map(len, contents.values())), 0
        for gpa, size in runs(contents):
            for at in range(gpa, gpa + size, CHUNK):
                part = min(CHUNK, gpa + size - at)
                update(memory.hva(at, part), part)
                done += part
                if progress is not None:
                    progress(done, total)


def expected_digest(contents: Contents, areas: Sequence[bytes]) -> bytes:
    """The digest of what was meant to be measured: of the image and boot pages themselves, not of what memory holds now."""
    digest = LaunchDigest()
    for gpa in sorted(contents):
        digest.update_data(contents[gpa])
    for area in areas:
        digest.update_vmsa(area)
    return digest.digest()


def _give_secret(owner: OwnerSession, measured: Measured, memory: GuestMemory, secret: bytes | bytearray) -> None:
    """Seal the secret for this guest and put it into its secret page; the plaintext page is wiped."""
    page = boot.secret_page(secret)
    try:
        header, packet = owner.seal_secret(page, measured.measure)
    finally:
        page[:] = bytes(len(page))
    measured.secret(header, packet, memory.hva(boot.SECRET_PAGE, len(packet)))


def mark_private(map: GpaMap, memory: GuestMemory, ghcbs: range = range(0)) -> None:
    """The map of a SEV guest at its start: all private, but the shared page, the test area, and `ghcbs` (GPAs of pages)."""
    for slot in memory.slots:
        map.set_range(slot.gpa, slot.size, private=True)
    map.set_range(boot.SHARED_PAGE, boot.PAGE, private=False)
    map.set_range(boot.TEST_AREA, boot.TEST_SIZE, private=False)
    if ghcbs:
        map.set_range(ghcbs.start, len(ghcbs) * boot.PAGE, private=False)
