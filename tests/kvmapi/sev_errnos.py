"""Which errno the kernel can give for which SEV command, read off Linux 7.3: arch/x86/kvm/svm/sev.c and drivers/crypto/ccp/sev-dev.c.

Per command the errnos of its own function and of what that calls. To each come those of the way there (`ON_THE_WAY`), and, for what
reaches the security processor, those of the driver (`PSP`).
"""

from __future__ import annotations

from errno import EBADF, EBUSY, EFAULT, EINTR, EINVAL, EIO, ENODEV, ENOMEM, ENOTTY, EPERM, ETIMEDOUT

from kvmapi.words import ENOTSUPP

ON_THE_WAY = {ENOTTY, EFAULT, EINVAL, EPERM, EIO}
"""sev_mem_enc_ioctl: no SEV; the command struct; mirror or unknown; SNP; and kvm_vm_ioctl: a dead VM."""

PSP = {ENODEV, EBUSY, EIO, ETIMEDOUT}
"""__sev_do_cmd_locked: absent; dead or no buffer; a status; no answer."""

_STORED_FD = PSP | {EBADF}
_PIN = {EINVAL, ENOMEM}
_BLOB = {EINVAL, EFAULT, ENOMEM}
_VCPUS = {EINTR, EBUSY}

GUEST: dict[str, set[int]] = {
    "KVM_SEV_INIT": PSP | {EINVAL, ENOTTY, EBUSY, ENOMEM},
    "KVM_SEV_ES_INIT": PSP | {EINVAL, ENOTTY, EBUSY, ENOMEM},
    "KVM_SEV_INIT2": PSP | {EINVAL, EFAULT, ENOTTY, EBUSY, ENOMEM},
    "KVM_SEV_LAUNCH_START": _STORED_FD | _BLOB | {ENOTTY},
    "KVM_SEV_LAUNCH_UPDATE_DATA": _STORED_FD | _PIN | {ENOTTY, EFAULT},
    "KVM_SEV_LAUNCH_UPDATE_VMSA": _STORED_FD | _VCPUS | {ENOTTY, EINVAL},
    "KVM_SEV_LAUNCH_SECRET": _STORED_FD | _PIN | _BLOB | {ENOTTY},
    "KVM_SEV_LAUNCH_MEASURE": _STORED_FD | {ENOTTY, EFAULT, EINVAL, ENOMEM},
    "KVM_SEV_LAUNCH_FINISH": _STORED_FD | {ENOTTY},
    "KVM_SEV_SEND_START": _STORED_FD | _BLOB | {ENOTTY},
    "KVM_SEV_SEND_UPDATE_DATA": _STORED_FD | _PIN | {ENOTTY, EFAULT},
    "KVM_SEV_SEND_UPDATE_VMSA": {EINVAL},
    "KVM_SEV_SEND_FINISH": _STORED_FD | {ENOTTY},
    "KVM_SEV_SEND_CANCEL": _STORED_FD | {ENOTTY},
    "KVM_SEV_RECEIVE_START": _STORED_FD | _BLOB | {ENOTTY},
    "KVM_SEV_RECEIVE_UPDATE_DATA": _STORED_FD | _PIN | _BLOB,
    "KVM_SEV_RECEIVE_UPDATE_VMSA": {EINVAL},
    "KVM_SEV_RECEIVE_FINISH": _STORED_FD | {ENOTTY},
    "KVM_SEV_GUEST_STATUS": _STORED_FD | {ENOTTY, EFAULT},
    "KVM_SEV_DBG_DECRYPT": _STORED_FD | _PIN | {ENOTTY, EFAULT},
    "KVM_SEV_DBG_ENCRYPT": _STORED_FD | _PIN | {ENOTTY, EFAULT},
    "KVM_SEV_CERT_EXPORT": {EINVAL},
    "KVM_SEV_GET_ATTESTATION_REPORT": _STORED_FD | {ENOTTY, EFAULT, EINVAL, ENOMEM},
    "KVM_SEV_SNP_LAUNCH_START": _STORED_FD | {ENOTTY, EFAULT, EINVAL},
    "KVM_SEV_SNP_LAUNCH_UPDATE": {EINVAL, EFAULT, EIO},
    "KVM_SEV_SNP_LAUNCH_FINISH": _STORED_FD | _VCPUS | _BLOB | {ENOTTY},
    "KVM_SEV_SNP_ENABLE_REQ_CERTS": {EINVAL},
}

_ON_THE_WAY_TO_SEV = {ENODEV, EINVAL, EFAULT}
_INIT = PSP | {ENOMEM}  # from UNINIT the driver initialises the platform first

PLATFORM: dict[str, set[int]] = {
    "SEV_FACTORY_RESET": PSP | {EPERM, EBUSY},
    "SEV_PLATFORM_STATUS": PSP | {EFAULT},
    "SEV_PEK_GEN": _INIT | {EPERM},
    "SEV_PEK_CSR": _INIT | {EPERM, EFAULT, ENOMEM},
    "SEV_PDH_GEN": _INIT | {EPERM},
    "SEV_PDH_CERT_EXPORT": _INIT | {EFAULT, EPERM},
    "SEV_PEK_CERT_IMPORT": _INIT | _BLOB | {EPERM},
    "SEV_GET_ID": PSP | {ENOTSUPP, ENOMEM, EFAULT},
    "SEV_GET_ID2": PSP | {ENOTSUPP, ENOMEM, EFAULT},
    "SNP_PLATFORM_STATUS": PSP | {EINVAL, ENOMEM, EFAULT},
    "SNP_COMMIT": PSP,
    "SNP_SET_CONFIG": PSP | {EINVAL, EPERM, EFAULT},
    "SNP_VLEK_LOAD": PSP | _BLOB | {EPERM},
}

REGIONS: dict[str, set[int]] = {
    "KVM_MEMORY_ENCRYPT_REG_REGION": _PIN | {ENOTTY, EFAULT, EIO},
    "KVM_MEMORY_ENCRYPT_UNREG_REGION": {EINVAL, ENOTTY, EFAULT, EIO},
}

HOSTS = {ENOTTY, EBUSY, ENOMEM, ENODEV, EPERM, EBADF, ETIMEDOUT, EIO, EINTR, ENOTSUPP}
"""Errnos that the host, not the argument, must answer for: their hints need a remedy. (The others' conditions say what to pass.)"""


def guest_pairs() -> list[tuple[str, int]]:
    """(command, errno) of KVM_MEMORY_ENCRYPT_OP."""
    return [(name, code) for name, codes in GUEST.items() for code in sorted(codes | ON_THE_WAY)]


def platform_pairs() -> list[tuple[str, int]]:
    """(command, errno) of SEV_ISSUE_CMD."""
    return [(name, code) for name, codes in PLATFORM.items() for code in sorted(codes | _ON_THE_WAY_TO_SEV)]
