"""One row per condition: an ioctl, its argument, and the errno that every host must give.

A host that lacks a feature may answer otherwise: `Differs` names the feature (probed, never a version), the errno
there, and why. A row without `Differs` holds on every kernel that the project knows.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from errno import EINVAL
from pathlib import Path
from typing import Any

import pytest

from kvmapi.abi import caps
from kvmapi.abi.structs import kvm_create_guest_memfd, kvm_memory_attributes
from tests.conformance.snippets import Machine, address_of, expect_errno

OK = 0


@dataclass(frozen=True, slots=True)
class Differs:
    """On a host without `feature` the answer is `expected`."""

    feature: str
    expected: int
    why: str


@dataclass(frozen=True, slots=True)
class Row:
    """`argument` makes the struct (or the number) from a Machine; `setup` runs before."""

    name: str
    expected: int
    argument: Callable[[Machine], Any]
    setup: Callable[[Machine], object] | None = None
    differs: tuple[Differs, ...] = ()
    needs: str = ""
    older: int | None = None  # also right on a kernel: what earlier ones gave, where no probe tells which

    def right(self, machine: Machine, result: int) -> bool:
        """Is this raw ioctl result what the host must give?"""
        got = expect_errno(result)
        return got == self.expectation(machine) or (machine.host.name == "kernel" and self.older is not None and got == self.older)

    def expectation(self, machine: Machine) -> int:
        """The errno on this host; skips where the row says nothing."""
        if self.needs and not feature(machine, self.needs):
            pytest.skip(f"{machine.host.name}: no {self.needs}")
        for other in self.differs:
            if not feature(machine, other.feature):
                return other.expected
        return self.expected


def parametrize(rows: list[Row]) -> pytest.MarkDecorator:
    """One test per row, under its name."""
    names = [row.name for row in rows]
    assert len(set(names)) == len(names), "two rows have one name"
    return pytest.mark.parametrize("row", rows, ids=names)


def feature(machine: Machine, name: str) -> bool:
    """Does this host have it? Asked of the host itself."""
    return _PROBES[name](machine)


def _attributes_compiled_in(machine: Machine) -> bool:
    return machine.system.check_extension(caps.KVM_CAP_MEMORY_ATTRIBUTES) != 0


def _memfd_on_plain(machine: Machine) -> bool:
    return machine.system.check_extension(caps.KVM_CAP_GUEST_MEMFD_FLAGS) != 0


def _whole_width(machine: Machine) -> bool:
    """Can a slot lie anywhere below the CPU's physical address width?"""
    from kvmapi.errors import KvmError

    with machine.system.create_vm() as vm:
        try:
            vm.set_user_memory_region(0, 1 << 46, 4096, machine.hva)
        except KvmError:
            return False
    return True


def _hardware() -> bool:
    """A paravirtual KVM runs guests without SVM and VMX, by means of its own, and differs in corners."""
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "").split()
    return "svm" in flags or "vmx" in flags


def _has_xsave(machine: Machine) -> bool:
    return any(entry.function == 1 and entry.ecx >> 26 & 1 for entry in machine.system.supported_cpuid())


_PROBES: dict[str, Callable[[Machine], bool]] = {
    "memory attributes": _attributes_compiled_in,
    "guest_memfd on plain VMs": _memfd_on_plain,
    "guest_memfd": lambda machine: machine.system.check_extension(caps.KVM_CAP_GUEST_MEMFD) != 0,
    "SEV": lambda machine: machine.system.check_extension(caps.KVM_CAP_VM_TYPES) & 4 != 0,
    "SEV-ES": lambda machine: machine.system.check_extension(caps.KVM_CAP_VM_TYPES) & 8 != 0,
    "SW_PROTECTED": lambda machine: machine.system.check_extension(caps.KVM_CAP_VM_TYPES) & 2 != 0,
    "wide GPAs": _whole_width,
    "hardware virtualization": lambda machine: machine.host.name == "model" or _hardware(),
    "pre-fault": lambda machine: machine.system.check_extension(caps.KVM_CAP_PRE_FAULT_MEMORY) != 0,
    "a second address space": lambda machine: machine.vm.check_extension(caps.KVM_CAP_MULTI_ADDRESS_SPACE) == 2,
    "XSAVE": _has_xsave,
    # QEMU's TCG, on which the lab runs, is a CPU with limits of its own; they are not KVM's.
    "an exact CPU": lambda machine: machine.host.name == "model" or os.environ.get("SEVMM_IN_LAB") != "1",
    "the model": lambda machine: bool(machine.host.name == "model"),
}


__all__ = [
    "EINVAL",
    "OK",
    "Differs",
    "Row",
    "address_of",
    "expect_errno",
    "feature",
    "kvm_create_guest_memfd",
    "kvm_memory_attributes",
    "parametrize",
]
