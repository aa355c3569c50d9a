"""What a launch measures, page by page: predicted from the guest's image alone, or taken down from a real launch.

The prediction needs no device and no firmware. It computes the bytes that `vmm.machine` would write (`boot.contents`), hashes them
in the order of the launch commands, and for SEV-ES adds one VMSA per vCPU, built from the registers that `vmm.boot` sets and from
those that KVM resets (`kvmapi.vmsa`). A `Measurement` of either kind holds hashes, addresses and settings, never a key and never
contents (of a VMSA: its non-zero fields, which are what the VMM set), so it can be saved and sent to whoever wants to compare.

Invariants: regions are half-open, whole pages, ascending and do not touch; `digest` is SHA-256 over all regions and then all VMSAs
(`kvmapi.measurement`); `compare` of two measurements is None exactly when a firmware would give both the same MAC for the same key,
nonce and version.

Two things of a SEV host go into the guest's boot pages and cannot be known offline: the C-bit and what its KVM offers. They are
part of the setup; the defaults are the model's and those of a mainline KVM since 5.18.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmapi.measurement import VMSA_SIZE, LaunchDigest, expected_measure
from vmm import boot

if TYPE_CHECKING:
    from vmm.image import Image

SEV_TYPES = {"sev": 2, "sev-es": 3}
"""VM types whose launch is measured, with their numbers in the boot info."""

INIT, INIT2 = "init", "init2"
C_BIT = 51
FEATURES = boot.FEATURE_HYPERCALL | boot.FEATURE_MSR | boot.FEATURE_MMIO
_PLACES = ((boot.GDT, "GDT"), (boot.IDT, "IDT"), (boot.BOOT_INFO, "boot info"), (boot.TABLES, "page tables"),
           (boot.STACKS, "stacks"), (boot.TSS, "TSSs"), (0x100000, "image"))  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """What a measurement depends on beside the image. `guest` is only a name; `memory` in bytes; `init`: how KVM was told, by
    INIT or ES_INIT (`init`) or by INIT2 (`init2`); `features` as in the boot info.
    """

    guest: str
    type: str
    policy: int
    memory: int = 64 << 20
    vcpus: int = 1
    arguments: bytes = b""
    init: str = INIT2
    c_bit: int = C_BIT
    features: int = FEATURES

    @property
    def boot_info(self) -> boot.BootInfo:
        """The boot info page's values."""
        return boot.BootInfo(SEV_TYPES[self.type], 1 << self.c_bit, self.memory, self.vcpus, self.features, self.arguments)


def place(gpa: int) -> str:
    """What lies at `gpa` in a guest of our contract."""
    return next(name for start, name in reversed(((0, "memory"), *_PLACES)) if start <= gpa)


@dataclass(frozen=True)
class MeasuredRegion:
    """`[gpa, gpa + size)` went into the digest: the hash of it all, and of each of its pages."""

    gpa: int
    size: int
    sha256: bytes
    pages: tuple[bytes, ...]

    @property
    def name(self) -> str:
        """What lies there in a guest of our contract: "GDT, IDT"."""
        first = place(self.gpa)
        return ", ".join([first, *(name for gpa, name in _PLACES if self.gpa < gpa < self.gpa + self.size and name != first)])


@dataclass(frozen=True)
class MeasuredVmsa:
    """One vCPU's save area: its hash and its non-zero fields in the order of their offsets."""

    vcpu: int
    sha256: bytes
    fields: Mapping[str, int]


@dataclass(frozen=True)
class Answer:
    """What a firmware said: its version (API major, minor, build; None where that was not noted), LAUNCH_MEASURE's nonce and MAC."""

    version: tuple[int, int, int] | None
    nonce: bytes
    measure: bytes


@dataclass(frozen=True)
class Measurement:
    """What was measured (`kind` "launch") or would be ("prediction"). `regions` and `vmsas` are None where only the digest is
    known (a `run --json` output); `answer` is None where no firmware was asked.
    """

    kind: str
    setup: Setup
    digest: bytes
    regions: tuple[MeasuredRegion, ...] | None = None
    vmsas: tuple[MeasuredVmsa, ...] | None = None
    answer: Answer | None = None

    def mac(self, tik: bytes, nonce: bytes, version: tuple[int, int, int]) -> bytes:
        """What a firmware of `version` (API major, minor, build) answers to LAUNCH_MEASURE for this digest, 32 bytes."""
        major, minor, build = version
        return expected_measure(tik, self.digest, nonce, policy=self.setup.policy, api_major=major, api_minor=minor, build=build)


def predict(setup: Setup, image: Image) -> Measurement:
    """The measurement of `image` with this setup, without touching any device. `setup` must have passed `MachineConfig.check`."""
    contents = boot.contents(setup.boot_info, image)
    digest = LaunchDigest()
    for data in contents.values():
        digest.update_data(data)
    pages = predicted_vmsas(setup, image.entry) if setup.type == "sev-es" else []
    for page in pages:
        digest.update_vmsa(page)
    return Measurement("prediction", setup, digest.digest(), tuple(regions(contents)), tuple(vmsas(pages)))


def predicted_vmsas(setup: Setup, entry: int) -> list[bytes]:
    """The VMSA of each vCPU, from the registers the VMM sets and, for all others, a vCPU's reset values."""
    from kvmapi.abi.vcpu import kvm_regs, kvm_sregs
    from kvmapi.vmsa import build_vmsa

    found = []
    for vcpu in range(setup.vcpus):
        regs, sregs = kvm_regs(), kvm_sregs()
        boot.set_registers(regs, entry, vcpu)
        boot.set_system_registers(sregs, vcpu, setup.vcpus)
        found.append(build_vmsa(regs, sregs, init2=setup.init == INIT2))
    return found


def runs(contents: Mapping[int, bytes | memoryview]) -> Iterator[tuple[int, int]]:
    """The pieces as runs that touch, `(gpa, size)` in bytes, ascending: fewer commands, the same digest."""
    start = end = -1
    for gpa in sorted(contents):
        if gpa != end:
            if start >= 0:
                yield start, end - start
            start = gpa
        end = gpa + len(contents[gpa])
    if start >= 0:
        yield start, end - start


def regions(contents: Mapping[int, bytes | memoryview]) -> Iterator[MeasuredRegion]:
    """The runs of `contents` with their hashes."""
    for gpa, size in runs(contents):
        whole, pages = hashlib.sha256(), []
        at = gpa
        while at < gpa + size:
            piece = memoryview(contents[at])
            whole.update(piece)
            pages += [hashlib.sha256(piece[page : page + boot.PAGE]).digest() for page in range(0, len(piece), boot.PAGE)]
            at += len(piece)
        yield MeasuredRegion(gpa, size, whole.digest(), tuple(pages))


def vmsas(pages: Sequence[bytes]) -> Iterator[MeasuredVmsa]:
    """Hash and fields of each VMSA page, in the order of the vCPUs."""
    if not pages:
        return
    from kvmapi.vmsa import fields

    for vcpu, page in enumerate(pages):
        yield MeasuredVmsa(vcpu, hashlib.sha256(page).digest(), fields(page))


# -- comparing ---------------------------------------------------------------------------------------------------------------------------


def compare(expected: Measurement, found: Measurement) -> str | None:
    """The first thing of `found` that is not as `expected`, in one sentence; None where the measurements are the same."""
    if expected.setup.policy != found.setup.policy:
        return f"the policy is {found.setup.policy:#x}, expected {expected.setup.policy:#x}"
    if expected.digest == found.digest:
        return None
    first = None
    if expected.regions is not None and found.regions is not None:
        first = _first_region(expected.regions, found.regions)
    if first is None and expected.vmsas is not None and found.vmsas is not None:
        first = _first_vmsa(expected.vmsas, found.vmsas)
    if first is not None:
        return first
    text = f"the digest is {found.digest.hex()}, expected {expected.digest.hex()}"
    if expected.regions is None or found.regions is None:
        return f"{text}; without regions the place cannot be named (sevmm run --save-launch writes them)"
    return f"{text}, although all regions and VMSAs are the same: the file is not of one piece"


def _first_region(expected: Sequence[MeasuredRegion], found: Sequence[MeasuredRegion]) -> str | None:
    there = {region.gpa: region for region in found}
    for region in expected:
        other = there.pop(region.gpa, None)
        text = f"region {_range(region)} ({region.name})"
        if other is None:
            return f"{text} was not measured"
        if other.size != region.size:
            return f"{text} ends at {other.gpa + other.size:#x}"
        if other.sha256 != region.sha256:
            at = next((i for i, (a, b) in enumerate(zip(region.pages, other.pages)) if a != b), None)
            if at is None:
                return f"{text} differs: SHA-256 {other.sha256.hex()}, expected {region.sha256.hex()}"
            page, hashes = region.gpa + at * boot.PAGE, f"SHA-256 {other.pages[at].hex()}, expected {region.pages[at].hex()}"
            return f"{text} differs first in page {page:#x} ({place(page)}): {hashes}"
    extra = min(there.values(), key=lambda region: region.gpa, default=None)
    return f"region {_range(extra)} ({extra.name}) was measured too" if extra is not None else None


def _range(region: MeasuredRegion) -> str:
    return f"[{region.gpa:#x}, {region.gpa + region.size:#x})"


def _first_vmsa(expected: Sequence[MeasuredVmsa], found: Sequence[MeasuredVmsa]) -> str | None:
    if len(expected) != len(found):
        return f"{len(found)} VMSAs were measured, expected {len(expected)}"
    for area, other in zip(expected, found):
        if area.sha256 == other.sha256:
            continue
        for name in (*_field_names(), *area.fields, *other.fields):
            a, b = area.fields.get(name, 0), other.fields.get(name, 0)
            if a != b:
                return f"the VMSA of vCPU {area.vcpu} differs first in {name}: {b:#x}, expected {a:#x}"
        return f"the VMSA of vCPU {area.vcpu} differs: SHA-256 {other.sha256.hex()}, expected {area.sha256.hex()}"
    return None


def _field_names() -> list[str]:
    """All fields of a VMSA in the order of the page."""
    from kvmapi.vmsa import fields

    return list(fields(b"\xff" * VMSA_SIZE))


def setup_differences(expected: Setup, found: Setup) -> list[str]:
    """The settings that differ, one phrase each with the option that sets them; a hint, because not all of them are measured."""
    found_arguments = found.arguments.decode(errors="backslashreplace")
    rows = (
        ("type", found.type, expected.type, f"--type {found.type}"),
        ("memory", f"{found.memory >> 20} MiB", f"{expected.memory >> 20} MiB", f"--memory {found.memory >> 20}M"),
        ("vCPUs", found.vcpus, expected.vcpus, f"--vcpus {found.vcpus}"),
        ("arguments", repr(found_arguments), repr(expected.arguments.decode(errors="backslashreplace")), "--arguments"),
        ("initialisation", found.init, expected.init, f"--init {found.init}"),
        ("C-bit", found.c_bit, expected.c_bit, f"--c-bit {found.c_bit}"),
        ("features", f"{found.features:#x}", f"{expected.features:#x}", f"--features {found.features:#x}"),
        ("policy", f"{found.policy:#x}", f"{expected.policy:#x}", f"--policy {found.policy:#x}"),
    )
    return [f"{name} {there} there, {here} here ({option})" for name, there, here, option in rows if there != here]
