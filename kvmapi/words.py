"""What errors mean, as data: errno in words, causes and remedies per ioctl or SEV command, firmware status words.

A hint is keyed by (name, errno), where the name is an ioctl's or a KVM_SEV_* / SEV_* command's. It names the
conditions under which the kernel returns that errno there, in the order in which the kernel checks them (source:
virt/kvm/kvm_main.c, virt/kvm/guest_memfd.c, arch/x86/kvm/x86.c, arch/x86/kvm/svm/sev.c, drivers/crypto/ccp).
"""

from __future__ import annotations

import errno as e

EHWPOISON = 133
ENOTSUPP = 524
"""A kernel-internal errno that leaks out of /dev/sev; C libraries have no words for it."""

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
_NOT_SEV = (
    "this VM is not an SEV guest, or the host's KVM has no SEV: create the VM with type SEV or SEV-ES and run INIT2 first, or use the model"
)
_EXIT_STATE = "the vCPU's registers are encrypted after LAUNCH_UPDATE_VMSA and no longer readable or writable"

HINTS: dict[tuple[str, int], str] = {
    ("KVM_CREATE_VM", e.EINVAL): "this host does not offer the VM type: ask KVM_CHECK_EXTENSION(KVM_CAP_VM_TYPES)",
    ("KVM_CREATE_VM", e.ENOMEM): "the kernel could not allocate the VM: close other VMs or free memory",
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
    ("KVM_CREATE_GUEST_MEMFD", e.ENOTTY): "the kernel has no guest_memfd (6.8 or newer, KVM_CAP_GUEST_MEMFD)",
    ("KVM_SET_MEMORY_ATTRIBUTES", e.EINVAL): "flags must be 0, the range aligned to 4 KiB and not empty, and PRIVATE"
    " is offered only on SW_PROTECTED, SNP and TDX VMs; SEV and SEV-ES VMs have no private slots",
    ("KVM_SET_MEMORY_ATTRIBUTES", e.ENOTTY): "the kernel has no memory attributes: it needs"
    " CONFIG_KVM_SW_PROTECTED_VM, SNP or TDX (KVM_CAP_MEMORY_ATTRIBUTES)",
    ("KVM_PRE_FAULT_MEMORY", e.EINVAL): "flags must be 0, gpa and size aligned to 4 KiB, size not 0",
    ("KVM_PRE_FAULT_MEMORY", e.ENOENT): "the range starts outside every memory slot",
    ("KVM_PRE_FAULT_MEMORY", e.EOPNOTSUPP): "not with shadow paging, and on SNP only after LAUNCH_FINISH",
    ("KVM_PRE_FAULT_MEMORY", e.EAGAIN): "the slot is being deleted or moved: try again",
    ("KVM_ENABLE_CAP", e.EINVAL): "this VM cannot enable the capability, or args[0] has bits that KVM_CHECK_EXTENSION does not offer",
    ("KVM_ENABLE_CAP", e.EBADF): "args[0] of COPY or MOVE_ENC_CONTEXT_FROM must be the fd of a VM",
    ("KVM_ENABLE_CAP", e.EBUSY): "one of the two VMs is being moved already",
    ("KVM_MEMORY_ENCRYPT_OP", e.ENOTTY): _NOT_SEV,
    ("KVM_MEMORY_ENCRYPT_OP", e.EINVAL): "the command does not exist, or a mirror VM may not run it",
    ("KVM_MEMORY_ENCRYPT_OP", e.EPERM): "an SNP VM takes only SNP commands",
    ("KVM_MEMORY_ENCRYPT_OP", e.ENODEV): "the security processor is absent: load ccp, look for 'sev' in dmesg",
    ("KVM_MEMORY_ENCRYPT_OP", e.EBUSY): "the security processor is dead or busy: see dmesg",
    ("KVM_MEMORY_ENCRYPT_OP", e.EIO): "the firmware refused, or this VM was moved away and is dead",
    ("KVM_MEMORY_ENCRYPT_REG_REGION", e.ENOTTY): _NOT_SEV,
    ("KVM_MEMORY_ENCRYPT_REG_REGION", e.EINVAL): "size must not be 0 nor wrap; a mirror VM cannot register memory",
    ("KVM_MEMORY_ENCRYPT_REG_REGION", e.ENOMEM): "the range cannot be pinned: raise RLIMIT_MEMLOCK (ulimit -l) or"
    " give CAP_IPC_LOCK; the range must be mapped writable",
    ("KVM_MEMORY_ENCRYPT_UNREG_REGION", e.ENOTTY): _NOT_SEV,
    ("KVM_MEMORY_ENCRYPT_UNREG_REGION", e.EINVAL): "address and size must be those of one registration, exactly",
    ("KVM_X86_SET_MSR_FILTER", e.EINVAL): "unknown flags, an empty default-deny filter, or a bitmap over 0x600 bytes",
    ("KVM_RUN", e.EINVAL): "an SEV type VM needs INIT2 first, and an SEV-ES vCPU a valid VMSA (LAUNCH_UPDATE_VMSA)",
    ("KVM_RUN", e.EIO): "this VM is dead: it was moved away, or another process tries to run it",
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
    # --- SEV commands
    ("KVM_SEV_INIT", e.EINVAL): "only on a type-0 VM without vCPUs that is not SEV yet; types 2 and 3 take INIT2",
    ("KVM_SEV_INIT", e.EBUSY): "no free SEV ASID: end another guest, or raise the BIOS's SEV ASID limit",
    ("KVM_SEV_ES_INIT", e.EINVAL): "only on a type-0 VM without vCPUs that is not SEV yet; types 2 and 3 take INIT2",
    ("KVM_SEV_ES_INIT", e.EBUSY): "no free SEV-ES ASID: raise 'SEV-ES ASID Space Limit' in the BIOS",
    ("KVM_SEV_ES_INIT", e.ENOTTY): "SEV-ES is disabled on this host: kvm_amd.sev_es, BIOS",
    ("KVM_SEV_INIT2", e.EINVAL): "in the kernel's order: VM type must be SEV or SEV-ES and not initialised, no vCPUs"
    " yet, flags 0, vmsa_features within attribute KVM_X86_SEV_VMSA_FEATURES, ghcb_version 0 on SEV and <= 2 on SEV-ES",
    ("KVM_SEV_INIT2", e.EBUSY): "no free ASID of this kind: end another guest, or change the BIOS's ASID split",
    ("KVM_SEV_LAUNCH_START", e.EBADF): "sev_fd must be an open /dev/sev",
    ("KVM_SEV_LAUNCH_START", e.EINVAL): "certificate or session longer than 16 KiB, or an address with length 0",
    ("KVM_SEV_LAUNCH_UPDATE_DATA", e.EINVAL): "length 0, or the range wraps",
    ("KVM_SEV_LAUNCH_UPDATE_DATA", e.ENOMEM): "the range cannot be pinned: raise RLIMIT_MEMLOCK or give CAP_IPC_LOCK",
    ("KVM_SEV_LAUNCH_UPDATE_VMSA", e.ENOTTY): "only SEV-ES guests have VMSAs",
    ("KVM_SEV_LAUNCH_UPDATE_VMSA", e.EINVAL): "a vCPU is being debugged, has a non-default DR7, or is encrypted already",
    ("KVM_SEV_LAUNCH_SECRET", e.EINVAL): "the guest range must be physically contiguous: keep it inside one page",
    ("KVM_SEV_LAUNCH_MEASURE", e.EINVAL): "the buffer is longer than 16 KiB",
    ("KVM_SEV_SEND_START", e.EINVAL): "PDH certificate and session are required, session within 16 KiB",
    ("KVM_SEV_SEND_UPDATE_DATA", e.EINVAL): "addresses and guest_len are required; one page at most, not across two",
    ("KVM_SEV_RECEIVE_START", e.EINVAL): "PDH certificate and session, with their lengths, are required",
    ("KVM_SEV_RECEIVE_START", e.EBADF): "sev_fd must be an open /dev/sev",
    ("KVM_SEV_RECEIVE_UPDATE_DATA", e.EINVAL): "every field is required; one page at most, not across two",
    ("KVM_SEV_DBG_DECRYPT", e.EINVAL): "addresses and length must not be 0",
    ("KVM_SEV_DBG_ENCRYPT", e.EINVAL): "addresses and length must not be 0",
    # --- /dev/sev
    ("SEV_ISSUE_CMD", e.ENODEV): "the security processor is absent or failed to start: see dmesg, load ccp",
    ("SEV_ISSUE_CMD", e.EINVAL): "this kernel does not know the command",
    ("SEV_ISSUE_CMD", e.EPERM): "the command changes the platform: open /dev/sev for writing (as root)",
    ("SEV_PDH_CERT_EXPORT", e.EPERM): "the platform is not initialised: open /dev/sev for writing, or start a guest",
    ("SEV_FACTORY_RESET", e.EBUSY): "guests are running: end them first",
    ("SEV_GET_ID2", ENOTSUPP): "needs SEV API 0.16 or newer",
    # --- files
    ("fallocate", e.EOPNOTSUPP): "a guest_memfd takes KEEP_SIZE with or without PUNCH_HOLE, and nothing else",
    ("fallocate", e.EINVAL): "offset and length must be multiples of 4 KiB, not empty, inside the file",
    ("mmap", e.ENODEV): "a guest_memfd can be mapped only if it was created with GUEST_MEMFD_FLAG_MMAP",
}

GENERIC_HINTS: dict[int, str] = {
    e.ENOTTY: "this kernel, or this kind of fd, does not have the ioctl",
    e.EFAULT: "an address in the argument is not mapped in this process",
    e.EIO: "this VM is dead (moved away), or it belongs to another process's memory",
    e.EBADF: "the fd was closed",
    e.EINTR: "a signal arrived; call again",
    e.ENOMEM: "free memory, or raise the limits of this process",
    e.EMFILE: "raise RLIMIT_NOFILE (ulimit -n)",
    e.EPERM: "this process may not do that",
}

FIRMWARE: dict[int, tuple[str, str]] = {
    0x00: ("success", ""),
    0x01: ("the platform is in the wrong state", "read SEV_PLATFORM_STATUS; INIT is needed, or no running guest"),
    0x02: ("the guest is in the wrong state", "read KVM_SEV_GUEST_STATUS and follow START, UPDATE, MEASURE, FINISH"),
    0x03: ("the platform's configuration is invalid", "reset the configuration in the BIOS"),
    0x04: ("a buffer is too short", "the needed length was written back: pass a buffer of that length"),
    0x05: ("the platform already has an owner", "SEV_FACTORY_RESET gives it back"),
    0x06: ("a certificate is invalid", "check kind, version and 2084-byte length, and the chain"),
    0x07: ("the guest's policy forbids it", "NODBG forbids debugging, NOSEND sending; API version must be in reach"),
    0x08: ("the guest is not active", "it has no ASID: LAUNCH_START binds one"),
    0x09: ("an address is invalid", "addresses and lengths must be multiples of 16 bytes, and pinned"),
    0x0A: ("a signature is wrong", "the certificate is not signed by the key above it"),
    0x0B: ("a measurement or MAC is wrong", "keys, policy, API version or build do not match what the owner used"),
    0x0C: ("the ASID is taken", "use another ASID"),
    0x0D: ("the ASID is invalid", "it is outside this guest kind's range: see CPUID 0x8000001F"),
    0x0E: ("caches must be written back first", "the kernel does this; report it"),
    0x0F: ("a data fabric flush is needed first", "the kernel does this; report it"),
    0x10: ("no such guest", "the handle is stale: the guest was decommissioned"),
    0x11: ("no such command", "the firmware is too old for the command"),
    0x12: ("the guest is active", "deactivate it first"),
    0x13: ("a hardware error that leaves the platform usable", "retry; see dmesg"),
    0x14: ("a hardware error that makes the platform unsafe", "reset the machine"),
    0x15: ("not supported", "firmware or CPU lacks the feature"),
    0x16: ("a parameter is invalid", "check reserved fields and flags"),
    0x17: ("a resource limit is reached", "end other guests"),
    0x18: ("the secret packet does not verify", "wrong TIK or TEK, wrong lengths, or another measurement"),
    0x19: ("wrong page size", "RMP and command disagree about 4 KiB or 2 MiB"),
    0x1A: ("wrong page state", "the RMP entry is not in the state that the command needs"),
    0x1B: ("a metadata entry is invalid", ""),
    0x1C: ("the page belongs to another guest", ""),
    0x1D: ("the message counter would overflow", "start a new context"),
    0x1F: ("the command left the ring buffer", ""),
    0x20: ("the RMP must be initialised first", "run SNP_INIT"),
    0x21: ("a security version number is too low", "the firmware image is older than the committed one"),
    0x22: ("a version is wrong", "the firmware image is older than the committed one"),
    0x23: ("the platform must be shut down first", "run SNP_SHUTDOWN"),
    0x24: ("the firmware update failed", "the old firmware runs on"),
    0x25: ("the firmware must be restored", "load the committed firmware image"),
    0x26: ("initialising the RMP failed", "see dmesg; check the BIOS's RMP coverage"),
    0x27: ("a key is invalid", ""),
    0x28: ("shutting down did not complete", "repeat it"),
    0x30: ("a buffer has the wrong length", ""),
    0x31: ("a longer buffer is requested", "repeat with a longer buffer"),
    0x32: ("a device message is to be delivered", ""),
    0x33: ("the device answered with an error", ""),
    0x35: ("the device connection has an error", ""),
    0x36: ("the device context is invalid", ""),
    0x37: ("the device interface's context is invalid", ""),
    0x38: ("the device interface is invalid", ""),
    0x39: ("memory must be reclaimed first", ""),
    0x3A: ("in use", ""),
    0x3B: ("the device is in the wrong state", ""),
    0x3C: ("the device interface is in the wrong state", ""),
    0x3D: ("the device's certificate changed", ""),
    0x3E: ("a resynchronisation is needed", ""),
    0x3F: ("the response is too large", ""),
    0xFFFF_FFFF: ("the firmware was not reached", "the kernel refused before calling it"),
}


def hint_for(names: tuple[str, ...], code: int) -> str:
    """The hint of the first of `names` that has one for this errno, else what the errno means anywhere, else ""."""
    for name in names:
        if hint := HINTS.get((name, code)):
            return hint
    return GENERIC_HINTS.get(code, "")
