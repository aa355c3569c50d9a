"""What errors mean, as data: errno in words, causes and remedies per ioctl; SEV commands have theirs in `kvmapi.words_sev`.

A hint is keyed by (name, errno), where the name is an ioctl's, with the VM type or capability that it asks for in
brackets where the answer depends on it, or a KVM_SEV_* / SEV_* command's. It names the
conditions under which the kernel returns that errno there, in the order in which the kernel checks them (source:
virt/kvm/kvm_main.c, virt/kvm/guest_memfd.c, arch/x86/kvm/x86.c), and what to do where that is not plain from the
condition: an entry of `kvmapi.remedies`, which `sevmm doctor` quotes as well.
"""

from __future__ import annotations

import errno as e

from kvmapi import words_sev
from kvmapi.remedies import Hint, Remedy
from kvmapi.words_sev import ENOTSUPP

EHWPOISON = 133

_NAMES = {EHWPOISON: "EHWPOISON", ENOTSUPP: "ENOTSUPP"}

_ERRNO_WORDS = {
    e.EPERM: "not allowed",
    e.ENOENT: "nothing there",
    e.EINTR: "interrupted by a signal",
    e.EIO: "input/output error",
    e.E2BIG: "too long",
    e.EBADF: "bad file descriptor",
    e.EAGAIN: "not now, try again",
    e.ENOMEM: "out of memory or over a limit",
    e.EACCES: "permission denied",
    e.EFAULT: "bad address",
    e.EBUSY: "busy",
    e.EEXIST: "already there",
    e.ENODEV: "no such device",
    e.EINVAL: "invalid argument",
    e.EMFILE: "too many open files",
    e.ENOTTY: "no such ioctl on this fd",
    e.ENOSPC: "no space left",
    e.EOPNOTSUPP: "not supported",
    e.ENXIO: "no such attribute",
    EHWPOISON: "memory has a hardware error",
    ENOTSUPP: "not supported by this firmware",
}


def errno_name(code: int) -> str:
    """EINVAL and the like; a number without a name stays a number."""
    return _NAMES.get(code) or e.errorcode.get(code, f"errno {code}")


def errno_words(code: int) -> str:
    """An errno as people say it.

    >>> errno_words(25)
    'ENOTTY (no such ioctl on this fd)'
    """
    import os

    return f"{errno_name(code)} ({_ERRNO_WORDS.get(code) or os.strerror(code).lower()})"


_SLOT_EINVAL = (
    "check, in the kernel's order: flags (GUEST_MEMFD needs REGION2 and excludes LOG_DIRTY and READONLY; READONLY is"
    " refused on SEV-ES), slot id, 4 KiB alignment of size, GPA and host address, wrap-around, deletion of an absent"
    " slot, change of size, host address or flags of an existing slot (delete it first)"
)
_NO_TYPE = "this host does not offer the VM type: ask KVM_CHECK_EXTENSION(KVM_CAP_VM_TYPES)"
_EXIT_STATE = "the vCPU's registers are encrypted after LAUNCH_UPDATE_VMSA and no longer readable or writable"

_KVM: dict[tuple[str, int], str | Hint] = {
    ("KVM_CREATE_VM", e.EINVAL): _NO_TYPE,
    ("KVM_CREATE_VM(1)", e.EINVAL): Hint(_NO_TYPE, Remedy.SW_PROTECTED),
    ("KVM_CREATE_VM(2)", e.EINVAL): Hint(_NO_TYPE, Remedy.SEV),
    ("KVM_CREATE_VM(3)", e.EINVAL): Hint(_NO_TYPE, Remedy.SEV_ES),
    ("KVM_CREATE_VM(4)", e.EINVAL): Hint(_NO_TYPE, Remedy.SNP),
    ("KVM_CREATE_VM", e.ENOMEM): Hint("the kernel could not allocate the VM", Remedy.MEMORY),
    ("KVM_CREATE_VCPU", e.EEXIST): "a vCPU with this id exists already",
    ("KVM_CREATE_VCPU", e.EINVAL): "the id is above KVM_CAP_MAX_VCPU_ID, or the VM has KVM_CAP_MAX_VCPUS vCPUs",
    ("KVM_SET_USER_MEMORY_REGION", e.EINVAL): _SLOT_EINVAL,
    ("KVM_SET_USER_MEMORY_REGION2", e.EINVAL): _SLOT_EINVAL + "; a guest_memfd must belong to this VM and be as long as offset + size",
    ("KVM_SET_USER_MEMORY_REGION", e.EEXIST): "the GPA range overlaps another slot",
    ("KVM_SET_USER_MEMORY_REGION2", e.EEXIST): "the GPA range overlaps another slot, or the file range another binding",
    ("KVM_SET_USER_MEMORY_REGION2", e.EBADF): "guest_memfd is not an open file descriptor",
    ("KVM_SET_USER_MEMORY_REGION2", e.ENOTTY): "the kernel is older than 6.8: use KVM_SET_USER_MEMORY_REGION",
    ("KVM_CREATE_GUEST_MEMFD", e.EINVAL): "size must be positive and a multiple of 4 KiB, flags within"
    " KVM_CAP_GUEST_MEMFD_FLAGS (INIT_SHARED only on VMs without private memory)",
    ("KVM_CREATE_GUEST_MEMFD", e.ENOTTY): Hint("the kernel has no guest_memfd (KVM_CAP_GUEST_MEMFD)", Remedy.NEWER_KERNEL),
    ("KVM_SET_MEMORY_ATTRIBUTES", e.EINVAL): "flags must be 0, the range aligned to 4 KiB and not empty, and PRIVATE"
    " is offered only on SW_PROTECTED, SNP and TDX VMs; SEV and SEV-ES VMs have no private slots",
    ("KVM_SET_MEMORY_ATTRIBUTES", e.ENOTTY): Hint("the kernel has no memory attributes (KVM_CAP_MEMORY_ATTRIBUTES)", Remedy.ATTRIBUTES),
    ("KVM_PRE_FAULT_MEMORY", e.EINVAL): "flags must be 0, gpa and size aligned to 4 KiB, size not 0",
    ("KVM_PRE_FAULT_MEMORY", e.ENOENT): "the range starts outside every memory slot",
    ("KVM_PRE_FAULT_MEMORY", e.EOPNOTSUPP): "not with shadow paging, and on SNP only after LAUNCH_FINISH",
    ("KVM_PRE_FAULT_MEMORY", e.EAGAIN): "the slot is being deleted or moved: try again",
    ("KVM_ENABLE_CAP", e.EINVAL): "this VM cannot enable the capability, or args[0] has bits that KVM_CHECK_EXTENSION does not offer",
    (
        "KVM_ENABLE_CAP(197)",
        e.EINVAL,
    ): "a VM cannot mirror itself; this one must not be SEV nor have vCPUs; the source must be SEV and no mirror",
    (
        "KVM_ENABLE_CAP(206)",
        e.EINVAL,
    ): "a VM cannot move into itself; both must be of one type, this one not SEV, the source SEV (not SNP); on"
    " SEV-ES as many vCPUs here as there, and every VMSA of the source encrypted",
    **{
        (f"KVM_ENABLE_CAP({cap})", number): hint
        for cap in (197, 206)  # VM_COPY_ENC_CONTEXT_FROM, VM_MOVE_ENC_CONTEXT_FROM
        for number, hint in (
            (e.EBADF, Hint("args[0] must be the fd of a VM")),
            (e.EBUSY, Hint("one of the two VMs is being moved or mirrored by another thread", Remedy.AGAIN)),
            (e.EINTR, Hint("a fatal signal came while the two VMs were being locked", Remedy.AGAIN)),
            (e.ENOMEM, Hint("the kernel has no memory for it", Remedy.MEMORY)),
        )
    },
    ("KVM_X86_SET_MSR_FILTER", e.EINVAL): "unknown flags, an empty default-deny filter, or a bitmap over 0x600 bytes",
    ("KVM_RUN", e.EINVAL): Hint(
        "a VM of an SEV type that did not run INIT2 (one that took its context from another VM by MOVE stays so)", Remedy.INIT2
    ),
    ("KVM_RUN", e.EIO): Hint("this VM is dead", Remedy.DEAD_VM),
    ("KVM_RUN", e.ENOEXEC): "the vCPU is not initialised",
    ("KVM_SET_CPUID2", e.EINVAL): "CPUID cannot change after the first KVM_RUN, or a leaf contradicts the host",
    ("KVM_SET_CPUID2", e.E2BIG): "too many CPUID entries",
    ("KVM_GET_SUPPORTED_CPUID", e.E2BIG): "more entries than the buffer has room for",
    ("KVM_HAS_DEVICE_ATTR", e.ENXIO): "this kernel does not know the attribute",
    ("KVM_GET_DEVICE_ATTR", e.ENXIO): "this kernel does not know the attribute",
    **{
        (f"KVM_{verb}_{what}", e.EINVAL): _EXIT_STATE + "; otherwise a value the CPU would refuse"
        for verb in ("GET", "SET")
        for what in ("REGS", "SREGS", "SREGS2", "DEBUGREGS", "XCRS", "XSAVE", "FPU", "VCPU_EVENTS")
    },
    # --- files
    ("fallocate", e.EOPNOTSUPP): "a guest_memfd takes KEEP_SIZE with or without PUNCH_HOLE, and nothing else",
    ("fallocate", e.EINVAL): "offset and length must be multiples of 4 KiB, not empty, inside the file",
    ("mmap", e.ENODEV): "a guest_memfd can be mapped only if it was created with GUEST_MEMFD_FLAG_MMAP",
}

HINTS: dict[tuple[str, int], Hint] = {
    **{key: said if isinstance(said, Hint) else Hint(said) for key, said in _KVM.items()},
    **words_sev.HINTS,
}
"""(ioctl or command, errno) -> why and what to do."""

GENERIC_HINTS: dict[int, Hint] = {
    e.ENOTTY: Hint("this kernel, or this kind of fd, does not have the ioctl"),
    e.EFAULT: Hint("an address in the argument is not mapped in this process"),
    e.EIO: Hint("this VM is dead", Remedy.DEAD_VM),
    e.EBADF: Hint("the fd was closed"),
    e.EINTR: Hint("a signal arrived", Remedy.AGAIN),
    e.ENOMEM: Hint("out of memory", Remedy.MEMORY),
    e.EMFILE: Hint("this process has too many files open", Remedy.FILES),
    e.EPERM: Hint("this process may not do that"),
}


def hint_for(names: tuple[str, ...], code: int) -> str:
    """The hint of the first of `names` that has one for this errno, else what the errno means anywhere, else ""."""
    for name in names:
        if hint := HINTS.get((name, code)):
            return str(hint)
    return str(GENERIC_HINTS.get(code, ""))
