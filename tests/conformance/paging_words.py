"""What the tests of paging share: error codes as a host gives them, and what a host is known to lack."""

from __future__ import annotations

import pytest

from tests.conformance.paged import (
    FETCH,
    LONG,
    MODES,
    NXE,
    PAE_MODE,
    READ,
    WRITE,
    Mode,
    Paged,
    U,
)  # fmt: skip
from tests.conformance.rows import feature

every_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
wide_modes = pytest.mark.parametrize("mode", [LONG, PAE_MODE], ids=lambda mode: mode.name)
KINDS = (READ, WRITE, FETCH)
PF_P, PF_W, PF_U, PF_RSVD, PF_I = 1, 2, 4, 8, 16
NOWHERE = 0x4000_0000  # no slot there

LACKS = {
    "a paravirtual KVM": {"G at the top", "a store across two pages", "marks of a refused access"},  # G: not reserved on Intel's processors
    "the lab's CPU": {"G at the top"},
}


def lack(guest: Paged, name: str) -> None:
    """Skip what this host is known to lack."""
    if feature(guest, "the model"):
        return
    who = "the lab's CPU" if not feature(guest, "an exact CPU") else "a paravirtual KVM"
    if (who == "the lab's CPU" or not feature(guest, "hardware virtualization")) and name in LACKS[who]:
        pytest.skip(f"{who}: {name} is a known difference, see docs/fidelity.md")


def cause(kind: str, user: bool, mode: Mode, *, smep: bool = False) -> int:
    """The error code's bits that tell what was tried: the fetch bit only where NX or SMEP is on."""
    fetch = PF_I if kind == FETCH and (bool(mode.efer & NXE) or smep) else 0
    return (PF_W if kind == WRITE else 0) | (PF_U if user else 0) | fetch


def rsvd(guest: Paged) -> int:
    """A reserved bit was found in an entry that is present; QEMU's CPU does not say the latter."""
    return PF_RSVD | (PF_P if feature(guest, "an exact CPU") else 0)


def offered(guest: Paged, bit: int) -> bool:
    """Does CPUID leaf 7 offer this bit of EBX?"""
    return any(entry.function == 7 and entry.index == 0 and entry.ebx >> bit & 1 for entry in guest.system.supported_cpuid())


def supervisor_only(guest: Paged) -> None:
    """The identity map belongs to ring 0 alone: with SMAP its stack could not be used otherwise."""
    for page in range(512):
        at = guest.identity + page * guest.size
        guest.set_word(at, guest.word(at) & ~U)
