"""Numbers that KVM and memfd_create had in patch series before private memory was merged: the RFC dialects.

A dialect is one posting's interface. Most of its numbers mean something else on mainline (memfd_create's 0x0008 is
MFD_NOEXEC_SEAL there, capability 240 belongs to Arm, exit 36 to RISC-V), so a dialect is named, never guessed, and
never sent to a kernel that was not built from it. `DIALECTS` is one table of what differs, oldest first; the rows with
`calls` are the history of one ioctl, the one that says which pages are private.

Sources, all on the KVM lists: Chao Peng, "KVM: mm: fd-based approach for supporting KVM guest private memory", v6 (May
2022), v7 (July 2022) and v10 (December 2022), and his proposal of KVM_SET_MEMORY_ATTR (23 May 2022); Sean
Christopherson, "KVM: guest_memfd() and per-page attributes", RFC v11 (July 2023); Vishal Annapurve, "selftests for
fd-based private memory" (the MARK and CLR bits); Michael Roth, "Add AMD Secure Nested Paging Hypervisor Support", RFC v7
(KVM_CAP_UNMAPPED_PRIVATE_MEM).
"""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import Structure
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64
from dataclasses import dataclass, field
from errno import EFAULT
from typing import Literal

from kvmapi.abi import caps, ioctls, kvm
from kvmapi.abi.encoding import _IOR, _IOW, _IOWR
from kvmapi.abi.structs import kvm_enc_region, kvm_memory_attributes, kvm_userspace_memory_region

# --- memory that user space cannot reach -----------------------------------------------------------------------------
MFD_INACCESSIBLE = 0x0008
MFD_ALLOW_SEALING, MFD_HUGETLB = 0x0002, 0x0004
MFD_HUGE_SHIFT, MFD_HUGE_MASK = 26, 0x3F
KVM_MEM_PRIVATE = 1 << 2


class kvm_userspace_memory_region_ext(Structure):
    """KVM_SET_USER_MEMORY_REGION with KVM_MEM_PRIVATE in `region.flags`: 160 bytes behind a number that says 32."""

    _fields_ = [
        ("region", kvm_userspace_memory_region),
        ("private_offset", u64),
        ("private_fd", u32),
        ("pad1", u32),
        ("pad2", u64 * 14),
    ]


# --- hypercall bits of the tests: how the guest says what its accesses are ---------------------------------------------
KVM_MARK_GPA_RANGE_ENC_ACCESS = 1 << 8
KVM_CLR_GPA_RANGE_ENC_ACCESS = 1 << 9

# --- capabilities --------------------------------------------------------------------------------------------------
KVM_CAP_MEMORY_ATTRIBUTES_V10 = 225
KVM_CAP_USER_MEMORY2_V11 = 230
KVM_CAP_MEMORY_ATTRIBUTES_V11 = 231
KVM_CAP_UNMAPPED_PRIVATE_MEM = 240
_MAINLINE_ONLY = dict.fromkeys(
    (
        caps.KVM_CAP_USER_MEMORY2, caps.KVM_CAP_MEMORY_FAULT_INFO, caps.KVM_CAP_MEMORY_ATTRIBUTES, caps.KVM_CAP_GUEST_MEMFD,
        caps.KVM_CAP_GUEST_MEMFD_FLAGS, caps.KVM_CAP_PRE_FAULT_MEMORY,
    ),
    0,
)  # fmt: skip

# --- exits -----------------------------------------------------------------------------------------------------------
KVM_EXIT_MEMORY_FAULT_RFC = 36  # v6, v7
KVM_EXIT_MEMORY_FAULT_V10 = 38  # v10, v11
KVM_MEMORY_EXIT_FLAG_PRIVATE_RFC = 1 << 0  # v6 (32-bit flags, then padding) to v10 (64-bit flags)

# --- the attribute ioctl ---------------------------------------------------------------------------------------------


class kvm_memory_attr(Structure):
    """KVM_SET_MEMORY_ATTR as it was proposed: exactly one of the flags for [addr, addr+size)."""

    _fields_ = [("addr", u64), ("size", u64), ("flags", u64)]


KVM_MEMORY_ATTR_SHARED = 1 << 0
KVM_MEMORY_ATTR_PRIVATE = 1 << 1
KVM_SET_MEMORY_ATTR = _IOW(ioctls.KVMIO, 0xD2, kvm_memory_attr)  # the proposal gave no number; 0xd2 is what followed it
KVM_GET_SUPPORTED_MEMORY_ATTRIBUTES = _IOR(ioctls.KVMIO, 0xD2, u64)
KVM_SET_MEMORY_ATTRIBUTES_V10 = _IOWR(ioctls.KVMIO, 0xD3, kvm_memory_attributes)
KVM_SET_MEMORY_ATTRIBUTES_V11 = _IOW(ioctls.KVMIO, 0xD3, kvm_memory_attributes)
KVM_MEMORY_ATTRIBUTE_READ = 1 << 0
KVM_MEMORY_ATTRIBUTE_WRITE = 1 << 1
KVM_MEMORY_ATTRIBUTE_EXECUTE = 1 << 2


@dataclass(frozen=True, slots=True)
class Call:
    """One ioctl on a VM, as a row of the ioctl table has it."""

    name: str
    number: int
    struct: type[Structure] | type[u64]
    arg: Literal["in", "out", "inout"]
    words: str


@dataclass(frozen=True, slots=True)
class Dialect:
    """What one posting's interface is.

    `decides`: what says that a page is private: the memory "attribute" of its GFN, the "population" of the private file, or
    the "region" registered for encryption. `files`: private memory is a "guest_memfd" of KVM, or a "memfd" with
    MFD_INACCESSIBLE bound by kvm_userspace_memory_region_ext. `accesses`: how KVM learns what kind an access is: it
    is always what the page is ("page"), the guest has marked one range per vCPU ("vcpu"), or in a bitmap per slot ("slot").
    `pending`: what a guest asks for by MAP_GPA_RANGE waits until user space completes it. `fault`: KVM_EXIT_MEMORY_FAULT's
    number, its flag for a private access, and the errno of KVM_RUN. `vm_types`: which of the machine's types exist.
    `capabilities`: answers that differ from mainline's.
    """

    name: str
    when: str
    words: str
    decides: Literal["attribute", "population", "region"] = "attribute"
    files: Literal["guest_memfd", "memfd"] = "memfd"
    accesses: Literal["page", "vcpu", "slot"] = "page"
    pending: bool = False
    fault: tuple[int, int, int] = (KVM_EXIT_MEMORY_FAULT_RFC, KVM_MEMORY_EXIT_FLAG_PRIVATE_RFC, 0)
    vm_types: int = 1 << kvm.KVM_X86_DEFAULT_VM | 1 << kvm.KVM_X86_SEV_VM | 1 << kvm.KVM_X86_SEV_ES_VM
    capabilities: Mapping[int, int] = field(default_factory=lambda: _MAINLINE_ONLY, repr=False)
    calls: tuple[Call, ...] = ()


_UPM = {**_MAINLINE_ONLY, KVM_CAP_UNMAPPED_PRIVATE_MEM: 1}
_PAGES = "make a range of GPAs private or shared"
_GET_SUPPORTED = Call("KVM_GET_SUPPORTED_MEMORY_ATTRIBUTES", KVM_GET_SUPPORTED_MEMORY_ATTRIBUTES, u64, "out", "what a page can have")

MAINLINE = Dialect(
    "mainline",
    "since Linux 6.8",
    "guest_memfd, and KVM_SET_MEMORY_ATTRIBUTES decides",
    files="guest_memfd",
    fault=(kvm.KVM_EXIT_MEMORY_FAULT, kvm.KVM_MEMORY_EXIT_FLAG_PRIVATE, EFAULT),
    vm_types=(1 << 32) - 1,
    capabilities={},
    calls=(Call("KVM_SET_MEMORY_ATTRIBUTES", ioctls.KVM_SET_MEMORY_ATTRIBUTES, kvm_memory_attributes, "in", _PAGES),),
)

_ROWS = (
    Dialect(
        "upm-v6",
        "May 2022",
        "memfds with MFD_INACCESSIBLE; a page is private while it is populated there",
        decides="population",
        accesses="vcpu",
        capabilities=_UPM,
    ),
    Dialect(
        "attr-2022",
        "proposed on 23 May 2022",
        "KVM_SET_MEMORY_ATTR instead of population; a guest's request is pending until the ioctl completes it",
        pending=True,
        calls=(Call("KVM_SET_MEMORY_ATTR", KVM_SET_MEMORY_ATTR, kvm_memory_attr, "in", _PAGES),),
    ),
    Dialect(
        "upm-v7",
        "July 2022",
        "the region ioctls of SEV take GPAs and decide",
        decides="region",
        accesses="slot",
        capabilities=_UPM,
        calls=(
            Call("KVM_MEMORY_ENCRYPT_REG_REGION", ioctls.KVM_MEMORY_ENCRYPT_REG_REGION, kvm_enc_region, "in", "make GPAs private"),
            Call("KVM_MEMORY_ENCRYPT_UNREG_REGION", ioctls.KVM_MEMORY_ENCRYPT_UNREG_REGION, kvm_enc_region, "in", "make GPAs shared"),
        ),
    ),
    Dialect(
        "attr-v10",
        "December 2022",
        "KVM_SET_MEMORY_ATTRIBUTES with bits for rights; it writes back what is left to do",
        fault=(KVM_EXIT_MEMORY_FAULT_V10, KVM_MEMORY_EXIT_FLAG_PRIVATE_RFC, 0),
        capabilities={**_MAINLINE_ONLY, KVM_CAP_MEMORY_ATTRIBUTES_V10: 1},
        calls=(
            _GET_SUPPORTED,
            Call("KVM_SET_MEMORY_ATTRIBUTES", KVM_SET_MEMORY_ATTRIBUTES_V10, kvm_memory_attributes, "inout", _PAGES),
        ),
    ),
    Dialect(
        "attr-v11",
        "July 2023",
        "guest_memfd; KVM_SET_MEMORY_ATTRIBUTES has another number and writes nothing back",
        files="guest_memfd",
        fault=(KVM_EXIT_MEMORY_FAULT_V10, kvm.KVM_MEMORY_EXIT_FLAG_PRIVATE, 0),
        vm_types=1 << kvm.KVM_X86_DEFAULT_VM | 1 << kvm.KVM_X86_SW_PROTECTED_VM,
        capabilities={**_MAINLINE_ONLY, KVM_CAP_USER_MEMORY2_V11: 1, KVM_CAP_MEMORY_ATTRIBUTES_V11: 1, caps.KVM_CAP_GUEST_MEMFD: 1},
        calls=(_GET_SUPPORTED, Call("KVM_SET_MEMORY_ATTRIBUTES", KVM_SET_MEMORY_ATTRIBUTES_V11, kvm_memory_attributes, "in", _PAGES)),
    ),
    MAINLINE,
)

DIALECTS: dict[str, Dialect] = {row.name: row for row in _ROWS}
"""Every dialect by name, in the order of its posting."""


def dialect(name: str) -> Dialect:
    """The row called `name`; ValueError with the names there are."""
    try:
        return DIALECTS[name]
    except KeyError:
        raise ValueError(f"{name!r} is no dialect (known: {', '.join(DIALECTS)})") from None
