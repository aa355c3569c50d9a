"""What a failure of an SEV command means, as data: causes and remedies per (command, errno) and per firmware status.

`HINTS` has an entry for every errno that the kernel gives for a KVM_SEV_* or SEV_* command, under the command's own name where the reason
is its own, else under the ioctl that carries it. A hint lists the conditions in the order in which the kernel checks them (Linux 7.3:
arch/x86/kvm/svm/sev.c, virt/kvm/kvm_main.c, drivers/crypto/ccp/sev-dev.c). Where the host must change, the remedy is one of
`kvmapi.remedies.Remedy`; where the argument must, the condition says how.

The firmware's codes have one meaning each (`FIRMWARE`), and a narrower one after some commands (`AFTER`).
"""

from __future__ import annotations

import errno as e

from kvmapi.remedies import Hint, Remedy

ENOTSUPP = 524
"""A kernel-internal errno that leaks out of /dev/sev; C libraries have no words for it."""

_OP = "KVM_MEMORY_ENCRYPT_OP"
_REG, _UNREG = "KVM_MEMORY_ENCRYPT_REG_REGION", "KVM_MEMORY_ENCRYPT_UNREG_REGION"

_NOT_SEV = Hint("this VM is not an SEV guest, or the host's KVM has no SEV", Remedy.INIT2, Remedy.SEV)
_INIT = "only on a type-0 VM without vCPUs that is not SEV yet, and not on a mirror; types 2 and 3 take INIT2"
_PIN_RANGE = "the range is empty, wraps, or has more pages than the machine has memory"
_NO_MEMORY = "the range is not mapped (where KVM writes: not writable) or goes beyond the limit of locked memory"
_BLOBS = "an address is 0, or a length is 0 or above 16 KiB"
_NO_COMMAND = Hint("the kernel has the number and no such command: send and receive of SEV-ES state were never merged")
_ONE_PAGE = "one page at most, not across two"
_SNP_ONLY = "the VM is not an SNP guest"

HINTS: dict[tuple[str, int], Hint] = {
    # --- what any command may answer
    (_OP, e.ENOTTY): _NOT_SEV,
    (_OP, e.EFAULT): Hint("the command, the struct that its `data` points to, or a buffer that KVM copies is not mapped (or read-only)"),
    (_OP, e.EINVAL): Hint("the command does not exist, or this VM is a mirror: those take LAUNCH_UPDATE_VMSA, GUEST_STATUS and DBG_* only"),
    (_OP, e.EPERM): Hint("an SNP VM takes only SNP commands, of ids from 100", Remedy.INIT2),
    (_OP, e.EBADF): Hint(
        "the /dev/sev that the guest was started with is closed, or it was not started", Remedy.START_FIRST, Remedy.SEV_FD
    ),
    (_OP, e.ENODEV): Hint("the security processor is absent", Remedy.CCP),
    (_OP, e.EBUSY): Hint("the security processor is dead, or all its command buffers are in use", Remedy.PSP_DEAD),
    (_OP, e.ETIMEDOUT): Hint("the security processor did not answer in time; the kernel stops using it", Remedy.PSP_DEAD),
    (_OP, e.ENOMEM): Hint("the kernel has no memory for a copy of the buffers", Remedy.MEMORY),
    (_OP, e.EINTR): Hint("a fatal signal came while the vCPUs were being locked", Remedy.AGAIN),
    (_OP, e.EIO): Hint("the firmware refused, or this VM is dead", Remedy.DEAD_VM),
    # --- initialisation
    ("KVM_SEV_INIT", e.EINVAL): Hint(_INIT),
    ("KVM_SEV_INIT", e.ENOTTY): Hint("SEV is off, or no ASID is left to plain SEV", Remedy.SEV),
    ("KVM_SEV_INIT", e.EBUSY): Hint("no free SEV ASID, or the security processor is dead", Remedy.ASIDS_SEV, Remedy.PSP_DEAD),
    ("KVM_SEV_ES_INIT", e.EINVAL): Hint(_INIT),
    ("KVM_SEV_ES_INIT", e.ENOTTY): Hint("SEV-ES is off on this host, or has no ASIDs", Remedy.SEV_ES),
    ("KVM_SEV_ES_INIT", e.EBUSY): Hint("no free SEV-ES ASID, or the security processor is dead", Remedy.ASIDS_SEV_ES, Remedy.PSP_DEAD),
    ("KVM_SEV_INIT2", e.EINVAL): Hint(
        "in the kernel's order: VM type must be SEV or SEV-ES and not initialised, no vCPUs yet, flags 0, vmsa_features within attribute"
        " KVM_X86_SEV_VMSA_FEATURES, ghcb_version 0 on SEV and <= 2 on SEV-ES; not on a mirror"
    ),
    ("KVM_SEV_INIT2", e.ENOTTY): Hint("SEV is off, or no ASID is left to this kind of guest", Remedy.SEV, Remedy.SEV_ES),
    ("KVM_SEV_INIT2", e.EBUSY): Hint("no free ASID of this kind, or the security processor is dead", Remedy.ASIDS_SEV, Remedy.ASIDS_SEV_ES),
    # --- launch
    ("KVM_SEV_LAUNCH_START", e.EBADF): Hint("sev_fd is not an open /dev/sev", Remedy.SEV_FD),
    ("KVM_SEV_LAUNCH_START", e.EINVAL): Hint("certificate or session, if its address is not 0, has length 0 or above 16 KiB"),
    ("KVM_SEV_LAUNCH_UPDATE_DATA", e.EINVAL): Hint(_PIN_RANGE),
    ("KVM_SEV_LAUNCH_UPDATE_DATA", e.ENOMEM): Hint(_NO_MEMORY, Remedy.MEMLOCK),
    ("KVM_SEV_LAUNCH_UPDATE_VMSA", e.ENOTTY): Hint("only guests of type SEV-ES have VMSAs, after INIT2", Remedy.INIT2, Remedy.SEV_ES),
    ("KVM_SEV_LAUNCH_UPDATE_VMSA", e.EINVAL): Hint("a vCPU is being debugged, has a non-default DR7, or is encrypted already"),
    ("KVM_SEV_LAUNCH_UPDATE_VMSA", e.EBUSY): Hint(
        "a vCPU is being created, or the security processor is dead", Remedy.AGAIN, Remedy.PSP_DEAD
    ),
    ("KVM_SEV_LAUNCH_MEASURE", e.EINVAL): Hint("the buffer is longer than 16 KiB"),
    ("KVM_SEV_GET_ATTESTATION_REPORT", e.EINVAL): Hint("the buffer is longer than 16 KiB"),
    ("KVM_SEV_LAUNCH_SECRET", e.EINVAL): Hint(
        f"{_PIN_RANGE}; the guest range is not physically contiguous (keep it inside one page); packet or header: {_BLOBS}"
    ),
    ("KVM_SEV_LAUNCH_SECRET", e.ENOMEM): Hint(_NO_MEMORY, Remedy.MEMLOCK),
    # --- sending and receiving
    ("KVM_SEV_SEND_START", e.EINVAL): Hint(
        f"PDH certificate and session address are required, session within 16 KiB; certificates: {_BLOBS}"
    ),
    ("KVM_SEV_SEND_UPDATE_DATA", e.EINVAL): Hint(f"addresses and guest_len are required; {_ONE_PAGE}"),
    ("KVM_SEV_SEND_UPDATE_DATA", e.ENOMEM): Hint(f"{_NO_MEMORY}; or no kernel memory for packets of these lengths", Remedy.MEMLOCK),
    ("KVM_SEV_SEND_UPDATE_VMSA", e.EINVAL): _NO_COMMAND,
    ("KVM_SEV_RECEIVE_START", e.EINVAL): Hint(f"PDH certificate and session are required: {_BLOBS}"),
    ("KVM_SEV_RECEIVE_START", e.EBADF): Hint("sev_fd is not an open /dev/sev", Remedy.SEV_FD),
    ("KVM_SEV_RECEIVE_UPDATE_DATA", e.EINVAL): Hint(
        f"the VM is not an SEV guest; every field is required; {_ONE_PAGE}; header or packet above 16 KiB", Remedy.INIT2
    ),
    ("KVM_SEV_RECEIVE_UPDATE_DATA", e.ENOMEM): Hint(_NO_MEMORY, Remedy.MEMLOCK),
    ("KVM_SEV_RECEIVE_UPDATE_VMSA", e.EINVAL): _NO_COMMAND,
    ("KVM_SEV_CERT_EXPORT", e.EINVAL): Hint("the kernel has the number and no such command: SEV_PDH_CERT_EXPORT of /dev/sev exports"),
    # --- debugging
    **{
        (f"KVM_SEV_DBG_{verb}", number): hint
        for verb in ("DECRYPT", "ENCRYPT")
        for number, hint in (
            (e.EINVAL, Hint("addresses and length must not be 0, and no range may wrap")),
            (e.ENOMEM, Hint(f"of source or destination, {_NO_MEMORY}", Remedy.MEMLOCK)),
        )
    },
    # --- SNP
    ("KVM_SEV_SNP_LAUNCH_START", e.ENOTTY): Hint(f"{_SNP_ONLY}, or the firmware made no context", Remedy.SNP),
    ("KVM_SEV_SNP_LAUNCH_START", e.EINVAL): Hint("once only; flags 0, policy within KVM_X86_SNP_POLICY_BITS, with its must-be-one bit"),
    ("KVM_SEV_SNP_LAUNCH_UPDATE", e.EINVAL): Hint(f"{_SNP_ONLY} that was started; or a range, type or memslot is not right", Remedy.SNP),
    ("KVM_SEV_SNP_LAUNCH_FINISH", e.ENOTTY): Hint(_SNP_ONLY, Remedy.SNP),
    ("KVM_SEV_SNP_LAUNCH_FINISH", e.EINVAL): Hint("not started, flags not 0, or a vCPU is being debugged or is encrypted already"),
    ("KVM_SEV_SNP_ENABLE_REQ_CERTS", e.EINVAL): Hint(f"{_SNP_ONLY}, or has vCPUs already", Remedy.SNP),
    # --- regions
    (_REG, e.ENOTTY): _NOT_SEV,
    (_REG, e.EINVAL): Hint(f"{_PIN_RANGE}; or this VM is a mirror, whose memory is registered with the VM it mirrors"),
    (_REG, e.ENOMEM): Hint(_NO_MEMORY, Remedy.MEMLOCK),
    (_UNREG, e.ENOTTY): _NOT_SEV,
    (_UNREG, e.EINVAL): Hint("address and size must be those of one registration, exactly; not on a mirror"),
    # --- /dev/sev
    ("SEV_ISSUE_CMD", e.ENODEV): Hint(
        "the security processor is absent, failed to start, or (for SNP) is not initialised for it", Remedy.CCP
    ),
    ("SEV_ISSUE_CMD", e.EINVAL): Hint("this kernel does not know the command, or an address or length is 0 or above 16 KiB"),
    ("SEV_ISSUE_CMD", e.EFAULT): Hint("the command, its struct or a buffer is not mapped; or a buffer for certificates is above 16 KiB"),
    ("SEV_ISSUE_CMD", e.EPERM): Hint("the command changes the platform", Remedy.SEV_WRITABLE),
    ("SEV_ISSUE_CMD", e.EBUSY): Hint("the security processor is dead, or all its command buffers are in use", Remedy.PSP_DEAD),
    ("SEV_ISSUE_CMD", e.ETIMEDOUT): Hint("the security processor did not answer in time; the kernel stops using it", Remedy.PSP_DEAD),
    ("SEV_ISSUE_CMD", e.ENOMEM): Hint("the kernel has no memory for a buffer of this length", Remedy.MEMORY),
    ("SEV_ISSUE_CMD", e.EIO): Hint("the firmware refused", Remedy.PLATFORM_STATE),
    ("SEV_ISSUE_CMD", ENOTSUPP): Hint("the firmware is older than SEV API 0.16", Remedy.FIRMWARE),
    ("SEV_PDH_CERT_EXPORT", e.EPERM): Hint("the platform is not in state INIT, and going there and back changes it", Remedy.SEV_WRITABLE),
    ("SEV_FACTORY_RESET", e.EBUSY): Hint("guests exist, or the security processor is dead", Remedy.END_GUESTS, Remedy.PSP_DEAD),
    ("SNP_PLATFORM_STATUS", e.EINVAL): Hint("`data` is 0: it must point to a status struct"),
    ("SNP_SET_CONFIG", e.ENODEV): Hint("SNP is not initialised", Remedy.SNP),
    ("SNP_VLEK_LOAD", e.ENODEV): Hint("SNP is not initialised", Remedy.SNP),
}

FIRMWARE: dict[int, tuple[str, str]] = {
    0x00: ("success", ""),
    0x01: ("the platform is in the wrong state", Remedy.PLATFORM_STATE),
    0x02: ("the guest is in the wrong state", Remedy.LAUNCH_ORDER),
    0x03: ("the platform's configuration is invalid", Remedy.BIOS_RESET),
    0x04: ("a buffer is too short, or a length is not one that the command takes", Remedy.LENGTH),
    0x05: ("the platform already has an owner", Remedy.GIVE_BACK),
    0x06: ("a certificate is invalid", Remedy.CERTIFICATE),
    0x07: ("the guest's policy forbids it", Remedy.POLICY),
    0x08: ("the guest is not active: it has no ASID", Remedy.NEW_CONTEXT),
    0x09: ("an address is invalid", Remedy.ALIGN),
    0x0A: ("a signature is wrong", Remedy.UNSIGNED),
    0x0B: ("a measurement or MAC is wrong", Remedy.OWNER_DATA),
    0x0C: ("the ASID is taken", Remedy.KERNEL_BUG),
    0x0D: ("the ASID is invalid: outside the range of this kind of guest", Remedy.POLICY),
    0x0E: ("caches must be written back first", Remedy.KERNEL_BUG),
    0x0F: ("a data fabric flush is needed first", Remedy.KERNEL_BUG),
    0x10: ("no such guest: it was not started, or was decommissioned", Remedy.START_FIRST),
    0x11: ("the firmware has no such command", Remedy.FIRMWARE),
    0x12: ("the guest is active", Remedy.NEW_CONTEXT),
    0x13: ("a hardware error that leaves the platform usable", Remedy.AGAIN),
    0x14: ("a hardware error that makes the platform unsafe", Remedy.HARDWARE),
    0x15: ("firmware or processor lacks the feature", Remedy.FIRMWARE),
    0x16: ("a parameter is invalid", Remedy.FIELDS),
    0x17: ("a resource limit of the firmware is reached", Remedy.END_GUESTS),
    0x18: ("a secure packet or stored data does not verify", Remedy.OWNER_DATA),
    0x19: ("wrong page size: RMP and command disagree about 4 KiB or 2 MiB", Remedy.KERNEL_BUG),
    0x1A: ("wrong page state: the RMP entry is not in the state that the command needs", Remedy.KERNEL_BUG),
    0x1B: ("a metadata entry is invalid", Remedy.FIELDS),
    0x1C: ("the page belongs to another guest", Remedy.KERNEL_BUG),
    0x1D: ("the message counter would overflow", Remedy.NEW_CONTEXT),
    0x1F: ("the command left the ring buffer", Remedy.AGAIN),
    0x20: ("the RMP must be initialised first", Remedy.RMP),
    0x21: ("a security version number is lower than the committed one", Remedy.FIRMWARE),
    0x22: ("a version is lower than the committed one", Remedy.FIRMWARE),
    0x23: ("the platform must be shut down first", Remedy.END_GUESTS),
    0x24: ("the firmware update failed; the old firmware runs on", Remedy.FIRMWARE),
    0x25: ("the firmware must be restored to the committed image", Remedy.FIRMWARE),
    0x26: ("initialising the RMP failed", Remedy.RMP),
    0x27: ("a key is invalid", Remedy.FIELDS),
    0x28: ("shutting down did not complete", Remedy.AGAIN),
    0x30: ("a buffer has the wrong length", Remedy.LENGTH),
    0x31: ("a longer buffer is asked for", Remedy.LENGTH),
    0x32: ("a message to the device is to be delivered", Remedy.AGAIN),
    0x33: ("the device answered with an error", Remedy.HARDWARE),
    0x35: ("the device connection has an error", Remedy.HARDWARE),
    0x36: ("the device context is invalid", Remedy.FIELDS),
    0x37: ("the device interface's context is invalid", Remedy.FIELDS),
    0x38: ("the device interface is invalid", Remedy.FIELDS),
    0x39: ("memory must be reclaimed first", Remedy.KERNEL_BUG),
    0x3A: ("in use", Remedy.AGAIN),
    0x3B: ("the device is in the wrong state", Remedy.AGAIN),
    0x3C: ("the device interface is in the wrong state", Remedy.AGAIN),
    0x3D: ("the device's certificate changed", Remedy.CERTIFICATE),
    0x3E: ("a resynchronisation is needed", Remedy.AGAIN),
    0x3F: ("the response is too large", Remedy.LENGTH),
    0xFFFF_FFFF: ("the firmware was not reached", ""),
}
"""Status -> (words, remedy). Without remedy: success, and the value that means that the kernel refused first, where the errno tells."""

AFTER: dict[tuple[str, int], Hint] = {
    ("KVM_SEV_LAUNCH_START", 0x02): Hint("this VM's launch has begun already", Remedy.LAUNCH_ORDER),
    ("KVM_SEV_LAUNCH_START", 0x07): Hint(
        "policy and VM type disagree about SEV-ES (bit 2), or the firmware is too old for it", Remedy.POLICY
    ),
    ("KVM_SEV_LAUNCH_SECRET", 0x02): Hint("secrets go in between MEASURE and FINISH", Remedy.LAUNCH_ORDER),
    ("KVM_SEV_LAUNCH_MEASURE", 0x02): Hint("a guest is measured once, before FINISH", Remedy.LAUNCH_ORDER),
    ("KVM_SEV_SEND_START", 0x07): Hint(
        "the policy has NOSEND, or the destination is not of the domain, API or make it asks for", Remedy.POLICY
    ),
    ("KVM_SEV_DBG_DECRYPT", 0x07): Hint("the policy has NODBG: nobody reads this guest's memory", Remedy.POLICY),
    ("KVM_SEV_DBG_ENCRYPT", 0x07): Hint("the policy has NODBG: nobody writes this guest's memory", Remedy.POLICY),
    ("KVM_SEV_LAUNCH_UPDATE_DATA", 0x04): Hint("the length is no multiple of 16 bytes", Remedy.ALIGN),
    ("KVM_SEV_LAUNCH_SECRET", 0x04): Hint("header 52 bytes, packet as long as the guest range, a multiple of 16 bytes", Remedy.OWNER_DATA),
    ("KVM_SEV_RECEIVE_UPDATE_DATA", 0x04): Hint(
        "header 52 bytes, packet as long as the guest range, a multiple of 16 bytes", Remedy.OWNER_DATA
    ),
    ("SEV_PEK_CERT_IMPORT", 0x06): Hint(
        "the PEK must be this platform's own (SEV_PEK_CSR, anew after a reset), signed by the OCA given with it; both have 2084 bytes",
        Remedy.UNSIGNED,
    ),
}
"""What a status means after one command, where that says more than `FIRMWARE`."""


def firmware_hint(command: str, status: int) -> str:
    """What to do about a firmware status after `command`; "" where only the errno tells.

    >>> firmware_hint("KVM_SEV_GUEST_STATUS", 0x11)[:24]
    'update the SEV firmware:'
    """
    hint = AFTER.get((command, status))
    return str(hint) if hint else FIRMWARE.get(status, ("", ""))[1]
