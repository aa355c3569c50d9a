"""KVM's SEV commands (KVM_MEMORY_ENCRYPT_OP), their structs, guest states, policy bits and device attributes.

A command travels in a `kvm_sev_cmd`: `data` is the address of the command's own struct, and `error` comes back
with the firmware's status (`kvmapi.abi.psp`) when the firmware was reached. Headers before Linux 6.9 have these
structs without the explicit pads; the layout is the same.
"""

from __future__ import annotations

from ctypes import Structure
from ctypes import c_uint8 as u8
from ctypes import c_uint16 as u16
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64

KVM_SEV_INIT = 0
KVM_SEV_ES_INIT = 1
KVM_SEV_LAUNCH_START = 2
KVM_SEV_LAUNCH_UPDATE_DATA = 3
KVM_SEV_LAUNCH_UPDATE_VMSA = 4
KVM_SEV_LAUNCH_SECRET = 5
KVM_SEV_LAUNCH_MEASURE = 6
KVM_SEV_LAUNCH_FINISH = 7
KVM_SEV_SEND_START = 8
KVM_SEV_SEND_UPDATE_DATA = 9
KVM_SEV_SEND_UPDATE_VMSA = 10
KVM_SEV_SEND_FINISH = 11
KVM_SEV_RECEIVE_START = 12
KVM_SEV_RECEIVE_UPDATE_DATA = 13
KVM_SEV_RECEIVE_UPDATE_VMSA = 14
KVM_SEV_RECEIVE_FINISH = 15
KVM_SEV_GUEST_STATUS = 16
KVM_SEV_DBG_DECRYPT = 17
KVM_SEV_DBG_ENCRYPT = 18
KVM_SEV_CERT_EXPORT = 19
KVM_SEV_GET_ATTESTATION_REPORT = 20
KVM_SEV_SEND_CANCEL = 21
KVM_SEV_INIT2 = 22
KVM_SEV_SNP_LAUNCH_START = 100
KVM_SEV_SNP_LAUNCH_UPDATE = 101
KVM_SEV_SNP_LAUNCH_FINISH = 102
KVM_SEV_SNP_ENABLE_REQ_CERTS = 103

COMMAND_NAMES: dict[int, str] = {
    value: name for name, value in list(globals().items()) if name.startswith("KVM_SEV_") and isinstance(value, int)
}
"""Command id -> name."""

# Guest states, as GUEST_STATUS reports them. The kernel's headers do not name them; the firmware's interface does.
SEV_STATE_UNINIT = 0
SEV_STATE_LAUNCH_UPDATE = 1
SEV_STATE_LAUNCH_SECRET = 2
SEV_STATE_RUNNING = 3
SEV_STATE_SEND_UPDATE = 4
SEV_STATE_RECEIVE_UPDATE = 5
SEV_STATE_SENT = 6
STATE_NAMES = {
    0: "UNINIT",
    1: "LAUNCH_UPDATE",
    2: "LAUNCH_SECRET",
    3: "RUNNING",
    4: "SEND_UPDATE",
    5: "RECEIVE_UPDATE",
    6: "SENT",
}

# Policy bits (32-bit policy of LAUNCH_START).
SEV_POLICY_NODBG = 1 << 0
SEV_POLICY_NOKS = 1 << 1
SEV_POLICY_ES = 1 << 2
SEV_POLICY_NOSEND = 1 << 3
SEV_POLICY_DOMAIN = 1 << 4
SEV_POLICY_SEV = 1 << 5
SEV_POLICY_API_MAJOR_SHIFT = 16
SEV_POLICY_API_MINOR_SHIFT = 24

# Attributes of /dev/kvm that tell what INIT2 accepts.
KVM_X86_GRP_SEV = 1
KVM_X86_SEV_VMSA_FEATURES = 0
KVM_X86_SNP_POLICY_BITS = 1
KVM_X86_SEV_SNP_REQ_CERTS = 2

SVM_SEV_FEAT_DEBUG_SWAP = 1 << 5
SVM_SEV_FEAT_SECURE_TSC = 1 << 9

SEV_FW_BLOB_MAX_SIZE = 0x4000
"""Longest blob, in bytes, that KVM hands to the firmware (drivers' limit: 16 KiB)."""

MEASURE_SIZE = 48
"""LAUNCH_MEASURE blob: 32 bytes of MAC, 16 of nonce."""

KVM_SEV_PAGE_TYPE_INVALID = 0x0
KVM_SEV_SNP_PAGE_TYPE_NORMAL = 0x1
KVM_SEV_SNP_PAGE_TYPE_ZERO = 0x3
KVM_SEV_SNP_PAGE_TYPE_UNMEASURED = 0x4
KVM_SEV_SNP_PAGE_TYPE_SECRETS = 0x5
KVM_SEV_SNP_PAGE_TYPE_CPUID = 0x6


class kvm_sev_cmd(Structure):
    """The argument of KVM_MEMORY_ENCRYPT_OP."""

    _fields_ = [("id", u32), ("pad0", u32), ("data", u64), ("error", u32), ("sev_fd", u32)]


class kvm_sev_init(Structure):
    """KVM_SEV_INIT2."""

    _fields_ = [
        ("vmsa_features", u64),
        ("flags", u32),
        ("ghcb_version", u16),
        ("pad1", u16),
        ("pad2", u32 * 8),
    ]


class kvm_sev_launch_start(Structure):
    """KVM_SEV_LAUNCH_START: the handle comes back; certificate and session are optional (address 0)."""

    _fields_ = [
        ("handle", u32),
        ("policy", u32),
        ("dh_uaddr", u64),
        ("dh_len", u32),
        ("pad0", u32),
        ("session_uaddr", u64),
        ("session_len", u32),
        ("pad1", u32),
    ]


class kvm_sev_launch_update_data(Structure):
    """KVM_SEV_LAUNCH_UPDATE_DATA: host virtual [uaddr, uaddr+len), encrypted in place."""

    _fields_ = [("uaddr", u64), ("len", u32), ("pad0", u32)]


class kvm_sev_launch_secret(Structure):
    """KVM_SEV_LAUNCH_SECRET: packet header, where it goes in the guest, and the wrapped secret."""

    _fields_ = [
        ("hdr_uaddr", u64),
        ("hdr_len", u32),
        ("pad0", u32),
        ("guest_uaddr", u64),
        ("guest_len", u32),
        ("pad1", u32),
        ("trans_uaddr", u64),
        ("trans_len", u32),
        ("pad2", u32),
    ]


class kvm_sev_launch_measure(Structure):
    """KVM_SEV_LAUNCH_MEASURE: with `len` 0 the firmware only says how much room it wants."""

    _fields_ = [("uaddr", u64), ("len", u32), ("pad0", u32)]


class kvm_sev_guest_status(Structure):
    """KVM_SEV_GUEST_STATUS."""

    _fields_ = [("handle", u32), ("policy", u32), ("state", u32)]


class kvm_sev_dbg(Structure):
    """KVM_SEV_DBG_(DE|EN)CRYPT: both addresses are host virtual."""

    _fields_ = [("src_uaddr", u64), ("dst_uaddr", u64), ("len", u32), ("pad0", u32)]


class kvm_sev_attestation_report(Structure):
    """KVM_SEV_GET_ATTESTATION_REPORT."""

    _fields_ = [("mnonce", u8 * 16), ("uaddr", u64), ("len", u32), ("pad0", u32)]


class kvm_sev_send_start(Structure):
    """KVM_SEV_SEND_START."""

    _fields_ = [
        ("policy", u32),
        ("pad0", u32),
        ("pdh_cert_uaddr", u64),
        ("pdh_cert_len", u32),
        ("pad1", u32),
        ("plat_certs_uaddr", u64),
        ("plat_certs_len", u32),
        ("pad2", u32),
        ("amd_certs_uaddr", u64),
        ("amd_certs_len", u32),
        ("pad3", u32),
        ("session_uaddr", u64),
        ("session_len", u32),
        ("pad4", u32),
    ]


class kvm_sev_send_update_data(Structure):
    """KVM_SEV_SEND_UPDATE_DATA."""

    _fields_ = kvm_sev_launch_secret._fields_


class kvm_sev_receive_start(Structure):
    """KVM_SEV_RECEIVE_START."""

    _fields_ = [
        ("handle", u32),
        ("policy", u32),
        ("pdh_uaddr", u64),
        ("pdh_len", u32),
        ("pad0", u32),
        ("session_uaddr", u64),
        ("session_len", u32),
        ("pad1", u32),
    ]


class kvm_sev_receive_update_data(Structure):
    """KVM_SEV_RECEIVE_UPDATE_DATA."""

    _fields_ = kvm_sev_launch_secret._fields_


class kvm_sev_snp_launch_start(Structure):
    """KVM_SEV_SNP_LAUNCH_START."""

    _fields_ = [("policy", u64), ("gosvw", u8 * 16), ("flags", u16), ("pad0", u8 * 6), ("pad1", u64 * 4)]


class kvm_sev_snp_launch_update(Structure):
    """KVM_SEV_SNP_LAUNCH_UPDATE."""

    _fields_ = [
        ("gfn_start", u64),
        ("uaddr", u64),
        ("len", u64),
        ("type", u8),
        ("pad0", u8),
        ("flags", u16),
        ("pad1", u32),
        ("pad2", u64 * 4),
    ]


class kvm_sev_snp_launch_finish(Structure):
    """KVM_SEV_SNP_LAUNCH_FINISH."""

    _fields_ = [
        ("id_block_uaddr", u64),
        ("id_auth_uaddr", u64),
        ("id_block_en", u8),
        ("auth_key_en", u8),
        ("vcek_disabled", u8),
        ("host_data", u8 * 32),
        ("pad0", u8 * 3),
        ("flags", u16),
        ("pad1", u64 * 4),
    ]


def state_name(state: int) -> str:
    """Name of a guest state, or the number itself."""
    return STATE_NAMES.get(state, f"state {state}?")
