"""Known differences between the model and kernels, each with its reason: the table that a disagreement is looked up in.

A rule is keyed on features that the kernel is asked for (tests/conformance/rows.py), never on a version. `ends`: the
two sides are in different states after it, so what follows is not judged. docs/fidelity.md has the same facts for people.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from errno import EEXIST, EINVAL
from typing import Any

from kvmapi.abi import caps
from tests.conformance.rows import feature


@dataclass(frozen=True, slots=True)
class Known:
    """`when` looks at the Step, `given` asks the kernel's side for a feature."""

    name: str
    why: str
    when: Callable[[Any], bool]
    given: Callable[[Any], bool]
    ends: bool = True


def lacks(name: str) -> Callable[[Any], bool]:
    """On kernels without this feature of tests/conformance/rows.py."""
    return lambda side: not feature(side, name)


def has_smm(side: Any) -> bool:
    """A second address space of memory slots, for system management mode."""
    return bool(side.vm.check_extension(caps.KVM_CAP_MULTI_ADDRESS_SPACE) > 1)


def has_la57(side: Any) -> bool:
    """Five levels of paging on offer."""
    return any(leaf.function == 7 and leaf.index == 0 and leaf.ecx >> 16 & 1 for leaf in side.system.supported_cpuid())


def has_nested(side: Any) -> bool:
    """Guests of guests."""
    return bool(side.vm.check_extension(caps.KVM_CAP_NESTED_STATE))


def _in_second_space(step: Any) -> bool:
    return bool(step.fields.get("slot", 0) >> 16 == 1)


def _decimal(step: Any) -> bool:
    names = {"daa", "das", "aaa", "aas", "aam", "aad"}
    return step.what == "instructions" and any(instruction.text in names for instruction in step.fields["block"])


def always(_: Any) -> bool:
    return True


def _cap(*numbers: int) -> Callable[[Any], bool]:
    return lambda step: step.what == "KVM_CHECK_EXTENSION" and step.fields["cap"] in numbers


_ADDRESSES = {"0xc0000082", "0xc0000083", "0xc0000100", "0xc0000101", "0xc0000102"}
_SEGMENTS = ("cs.", "ds.", "es.", "fs.", "gs.", "ss.", "tr.", "ldt.")


def differing(step: Any) -> set[str]:
    """Names of the fields in which two structs differ."""
    if not isinstance(step.model, dict) or not isinstance(step.kernel, dict):
        return set()
    return {key for key in {**step.model, **step.kernel} if step.model.get(key) != step.kernel.get(key)}


def _segments_only(step: Any) -> bool:
    return step.what in ("KVM_GET_SREGS", "KVM_GET_SREGS2") and all(name.startswith(_SEGMENTS) for name in differing(step))


RULES: tuple[Known, ...] = (
    Known(
        "a capability that the model lacks",
        "it answers 0, and KVM_ENABLE_CAP EINVAL, as a kernel without the feature does",
        lambda step: (
            (step.what == "KVM_CHECK_EXTENSION" and step.model == 0 and step.kernel > 0)
            or (step.what == "KVM_ENABLE_CAP" and step.fields.get("lacked", False) and step.model == -EINVAL)
        ),
        always,
        ends=False,
    ),
    Known("VM types", "a machine's own: the model has SW_PROTECTED, SEV and SEV-ES", _cap(caps.KVM_CAP_VM_TYPES), always, ends=False),
    Known(
        "what needs two-dimensional paging",
        "a paravirtual KVM has none, and so cannot fault memory in beforehand",
        _cap(caps.KVM_CAP_PRE_FAULT_MEMORY, caps.KVM_CAP_MEMORY_ATTRIBUTES),
        lacks("hardware virtualization"),
        ends=False,
    ),
    Known(
        "SMM's address space", "the model has no system management mode, and so one address space", _in_second_space, has_smm, ends=False
    ),
    Known(
        "XCR0 bits of features that CPUID lacks",
        "a paravirtual KVM goes by what the host has, KVM by the guest's CPUID",
        lambda step: step.what == "KVM_SET_XCRS" and step.kernel == 0,
        lacks("hardware virtualization"),
    ),
    Known(
        "CR4 and EFER bits of features that CPUID lacks",
        "a paravirtual KVM takes them; KVM refuses what the guest's CPUID does not offer",
        lambda step: step.what.startswith("KVM_SET_SREGS") and step.kernel == 0 and bool({"cr4", "efer"} & set(step.fields)),
        lacks("hardware virtualization"),
    ),
    Known(
        "beyond the physical address width",
        "a machine's own: the model has 48 bits, as EPYC has",
        lambda step: step.what.startswith("KVM_SET_USER_MEMORY_REGION") and step.fields.get("guest_phys_addr", 0) >> 36 > 0,
        lacks("wide GPAs"),
    ),
    Known(
        "an attribute where no slot is",
        "KVM remembers that a page was MMIO until memory slots change, though the page has become private; the model looks again",
        lambda step: step.what.startswith("guest ") and "MemoryFault" in str(step.model) and "Mmio(" in str(step.kernel),
        lambda side: feature(side, "memory attributes"),
    ),
    Known(
        "binding a guest_memfd range twice",
        "EINVAL on earlier kernels, EEXIST since",
        lambda step: step.what == "KVM_SET_USER_MEMORY_REGION2" and (step.model, step.kernel) == (-EEXIST, -EINVAL),
        lacks("hardware virtualization"),
        ends=False,
    ),
    Known(
        "a slot on a mappable guest_memfd",
        "a paravirtual KVM's guest uses the slot's user memory; KVM with two-dimensional paging the file",
        lambda step: step.what.startswith("guest ") and step.fields.get("mappable", False),
        lacks("hardware virtualization"),
    ),
    Known(
        "attributes of segments",
        "a paravirtual KVM gives back what was set; kvm_amd what a VMCB can hold",
        _segments_only,
        lacks("hardware virtualization"),
        ends=False,
    ),
    Known(
        "the interrupt shadow",
        "a paravirtual KVM tells STI's and MOV SS's shadow apart; kvm_amd cannot",
        lambda step: step.what == "KVM_GET_VCPU_EVENTS" and differing(step) == {"interrupt.shadow"},
        lacks("hardware virtualization"),
        ends=False,
    ),
    Known(
        "MSRs that the model lacks",
        "variable MTRRs, TSC_ADJUST and the microcode's revision do not exist in the model",
        lambda step: step.what in ("KVM_SET_MSRS", "KVM_GET_MSRS") and bool({"0x3b", "0x8b", "0x200"} & set(step.fields)),
        always,
    ),
    Known(
        "MSR values that KVM itself refuses or cuts",
        "a paravirtual KVM does not check PAT and keeps all bits of SYSENTER_ESP and SYSENTER_EIP, which AMD processors do not have",
        lambda step: step.what in ("KVM_SET_MSRS", "KVM_GET_MSRS") and bool({"0x175", "0x176", "0x277"} & set(step.fields)),
        lacks("hardware virtualization"),
    ),
    Known(
        "addresses of 57 bits",
        "canonical is what the host's widest addresses are; the model's have 48 bits",
        lambda step: step.what == "KVM_SET_MSRS" and bool(_ADDRESSES & set(step.fields)),
        has_la57,
    ),
    Known(
        "MISC_ENABLE after reset",
        "a paravirtual KVM has FAST_STRINGS there; KVM the two bits that say that BTS and PEBS are missing",
        lambda step: step.what == "KVM_GET_MSRS" and "0x1a0" in differing(step),
        lacks("hardware virtualization"),
        ends=False,
    ),
    Known(
        "EFER.LMSLE",
        "a KVM with nested SVM lets a guest have it whatever its CPUID says; the model has no nested SVM",
        lambda step: step.what.startswith("KVM_SET_SREGS") and step.fields.get("efer") == 1 << 13,
        has_nested,
    ),
    Known(
        "decimal adjustments in real mode",
        "a paravirtual KVM's emulator lacks most of them, and takes the sign of AAD's and AAM's result from AH",
        _decimal,
        lacks("hardware virtualization"),
    ),
)


def rule_for(step: Any, kernel: Any) -> Known | None:
    """The rule that explains this difference on this kernel."""
    for rule in RULES:
        if rule.when(step) and rule.given(kernel):
            return rule
    return None
