"""Why an SEV-ES guest gave up, in words: the GHCB MSR's value that KVM_SYSTEM_EVENT_SEV_TERM carries.

With the MSR protocol (low 12 bits 0x100) the value has a reason set in bits 15:12 and a code in bits 23:16. Set 0 is the
standard's (AMD 56421), set 1 is what Linux uses for its own, set 14 is that of our guest library (guest/lib/ghcb.h). A
request through the GHCB page has its reason in the page, which KVM does not pass on: then the value is the page's GPA.

Every part of the value is the guest's word and may be anything.
"""

from __future__ import annotations

TERMINATE = 0x100
"""GHCB_MSR_TERM_REQ."""

SET_STANDARD, SET_LINUX, SET_SEVMM = 0, 1, 14

_SETS = {SET_STANDARD: "the GHCB standard", SET_LINUX: "Linux", SET_SEVMM: "the guest library of sevmm"}
_CODES = {
    (SET_STANDARD, 0): "a general reason",
    (SET_STANDARD, 1): "no GHCB version in common",
    (SET_STANDARD, 2): "an SEV-SNP feature that is missing",
    (SET_SEVMM, 1): "an exit other than CPUID before the vCPU had a GHCB page (no boot info, for one)",
    (SET_SEVMM, 2): "an instruction that its #VC handler cannot do",
    (SET_SEVMM, 3): "a #VC with an exit code that its handler does not know",
    (SET_SEVMM, 4): "an answer of the host that is none",
    (SET_SEVMM, 5): "a #VC inside its #VC handler",
    (SET_SEVMM, 6): "MMIO at an address that the guest holds to be private, or does not map",
}


def termination(value: int) -> str:
    """The rest of a sentence that begins with the vCPU.

    >>> termination(0x2E100)
    'asked for termination: an instruction that its #VC handler cannot do (reason set 14, the guest library of sevmm; code 2)'
    """
    if value & 0xFFF != TERMINATE:
        if value & 0xFFF:
            return f"asked the host for what only SEV-SNP guests have, and KVM ended it (GHCB MSR {value:#x})"
        return f"asked for termination through its GHCB at {value:#x} (KVM does not pass on why)"
    reason_set, code = value >> 12 & 0xF, value >> 16 & 0xFF
    name = f"reason set {reason_set}, {_SETS[reason_set]}" if reason_set in _SETS else f"reason set {reason_set}"
    words = _CODES.get((reason_set, code), "a reason of its own")
    return f"asked for termination: {words} ({name}; code {code})"
