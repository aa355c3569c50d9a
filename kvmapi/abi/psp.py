"""/dev/sev: SEV_ISSUE_CMD, the commands it carries, their packed structs, and the firmware's status codes.

The status codes are shared with KVM_MEMORY_ENCRYPT_OP, which returns them in `kvm_sev_cmd.error`.
"""

from __future__ import annotations

from ctypes import Structure
from ctypes import c_uint8 as u8
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64

from kvmapi.abi.encoding import _IOWR

# --- commands ----------------------------------------------------------------------------------------------------
SEV_FACTORY_RESET = 0
SEV_PLATFORM_STATUS = 1
SEV_PEK_GEN = 2
SEV_PEK_CSR = 3
SEV_PDH_GEN = 4
SEV_PDH_CERT_EXPORT = 5
SEV_PEK_CERT_IMPORT = 6
SEV_GET_ID = 7
SEV_GET_ID2 = 8
SNP_PLATFORM_STATUS = 9
SNP_COMMIT = 10
SNP_SET_CONFIG = 11
SNP_VLEK_LOAD = 12

# --- platform states and flags of PLATFORM_STATUS ----------------------------------------------------------------
SEV_PLATFORM_UNINIT = 0
SEV_PLATFORM_INIT = 1
SEV_PLATFORM_WORKING = 2
PLATFORM_STATE_NAMES = {0: "UNINIT", 1: "INIT", 2: "WORKING"}
SEV_STATUS_FLAGS_OWNED = 0x0001  # externally owned; from the firmware's interface, not in the kernel's header
SEV_STATUS_FLAGS_CONFIG_ES = 0x0100

# --- firmware status ---------------------------------------------------------------------------------------------
SEV_RET_NO_FW_CALL = 0xFFFF_FFFF
SEV_RET_SUCCESS = 0
SEV_RET_INVALID_PLATFORM_STATE = 0x01
SEV_RET_INVALID_GUEST_STATE = 0x02
SEV_RET_INVALID_CONFIG = 0x03
SEV_RET_INVALID_LEN = 0x04
SEV_RET_ALREADY_OWNED = 0x05
SEV_RET_INVALID_CERTIFICATE = 0x06
SEV_RET_POLICY_FAILURE = 0x07
SEV_RET_INACTIVE = 0x08
SEV_RET_INVALID_ADDRESS = 0x09
SEV_RET_BAD_SIGNATURE = 0x0A
SEV_RET_BAD_MEASUREMENT = 0x0B
SEV_RET_ASID_OWNED = 0x0C
SEV_RET_INVALID_ASID = 0x0D
SEV_RET_WBINVD_REQUIRED = 0x0E
SEV_RET_DFFLUSH_REQUIRED = 0x0F
SEV_RET_INVALID_GUEST = 0x10
SEV_RET_INVALID_COMMAND = 0x11
SEV_RET_ACTIVE = 0x12
SEV_RET_HWSEV_RET_PLATFORM = 0x13
SEV_RET_HWSEV_RET_UNSAFE = 0x14
SEV_RET_UNSUPPORTED = 0x15
SEV_RET_INVALID_PARAM = 0x16
SEV_RET_RESOURCE_LIMIT = 0x17
SEV_RET_SECURE_DATA_INVALID = 0x18
SEV_RET_INVALID_PAGE_SIZE = 0x19
SEV_RET_INVALID_PAGE_STATE = 0x1A
SEV_RET_INVALID_MDATA_ENTRY = 0x1B
SEV_RET_INVALID_PAGE_OWNER = 0x1C
SEV_RET_AEAD_OFLOW = 0x1D
SEV_RET_EXIT_RING_BUFFER = 0x1F
SEV_RET_RMP_INIT_REQUIRED = 0x20
SEV_RET_BAD_SVN = 0x21
SEV_RET_BAD_VERSION = 0x22
SEV_RET_SHUTDOWN_REQUIRED = 0x23
SEV_RET_UPDATE_FAILED = 0x24
SEV_RET_RESTORE_REQUIRED = 0x25
SEV_RET_RMP_INITIALIZATION_FAILED = 0x26
SEV_RET_INVALID_KEY = 0x27
SEV_RET_SHUTDOWN_INCOMPLETE = 0x28
SEV_RET_INCORRECT_BUFFER_LENGTH = 0x30
SEV_RET_EXPAND_BUFFER_LENGTH_REQUEST = 0x31
SEV_RET_SPDM_REQUEST = 0x32
SEV_RET_SPDM_ERROR = 0x33
SEV_RET_SEV_STATUS_ERR_IN_DEV_CONN = 0x35
SEV_RET_SEV_STATUS_INVALID_DEV_CTX = 0x36
SEV_RET_SEV_STATUS_INVALID_TDI_CTX = 0x37
SEV_RET_SEV_STATUS_INVALID_TDI = 0x38
SEV_RET_SEV_STATUS_RECLAIM_REQUIRED = 0x39
SEV_RET_IN_USE = 0x3A
SEV_RET_SEV_STATUS_INVALID_DEV_STATE = 0x3B
SEV_RET_SEV_STATUS_INVALID_TDI_STATE = 0x3C
SEV_RET_SEV_STATUS_DEV_CERT_CHANGED = 0x3D
SEV_RET_SEV_STATUS_RESYNC_REQ = 0x3E
SEV_RET_SEV_STATUS_RESPONSE_TOO_LARGE = 0x3F

RET_NAMES: dict[int, str] = {
    value: name.removeprefix("SEV_RET_")
    for name, value in list(globals().items())
    if name.startswith("SEV_RET_") and isinstance(value, int)
}
"""Firmware status -> name without SEV_RET_."""

# --- structs, all packed -----------------------------------------------------------------------------------------


class sev_issue_cmd(Structure):
    """The argument of SEV_ISSUE_CMD; `data` is the address of the command's struct."""

    _pack_ = 1
    _fields_ = [("cmd", u32), ("data", u64), ("error", u32)]


class sev_user_data_status(Structure):
    """SEV_PLATFORM_STATUS."""

    _pack_ = 1
    _fields_ = [
        ("api_major", u8),
        ("api_minor", u8),
        ("state", u8),
        ("flags", u32),
        ("build", u8),
        ("guest_count", u32),
    ]


class sev_user_data_pek_csr(Structure):
    """SEV_PEK_CSR."""

    _pack_ = 1
    _fields_ = [("address", u64), ("length", u32)]


class sev_user_data_pek_cert_import(Structure):
    """SEV_PEK_CERT_IMPORT."""

    _pack_ = 1
    _fields_ = [("pek_cert_address", u64), ("pek_cert_len", u32), ("oca_cert_address", u64), ("oca_cert_len", u32)]


class sev_user_data_pdh_cert_export(Structure):
    """SEV_PDH_CERT_EXPORT."""

    _pack_ = 1
    _fields_ = [
        ("pdh_cert_address", u64),
        ("pdh_cert_len", u32),
        ("cert_chain_address", u64),
        ("cert_chain_len", u32),
    ]


class sev_user_data_get_id(Structure):
    """SEV_GET_ID, deprecated: two sockets."""

    _pack_ = 1
    _fields_ = [("socket1", u8 * 64), ("socket2", u8 * 64)]


class sev_user_data_get_id2(Structure):
    """SEV_GET_ID2."""

    _pack_ = 1
    _fields_ = [("address", u64), ("length", u32)]


class sev_user_data_snp_status(Structure):
    """SNP_PLATFORM_STATUS."""

    _pack_ = 1
    _fields_ = [
        ("api_major", u8),
        ("api_minor", u8),
        ("state", u8),
        ("is_rmp_initialized", u8, 1),
        ("rsvd", u8, 7),
        ("build_id", u32),
        ("mask_chip_id", u32, 1),
        ("mask_chip_key", u32, 1),
        ("vlek_en", u32, 1),
        ("feature_info", u32, 1),
        ("rapl_dis", u32, 1),
        ("ciphertext_hiding_cap", u32, 1),
        ("ciphertext_hiding_en", u32, 1),
        ("rsvd1", u32, 25),
        ("guest_count", u32),
        ("current_tcb_version", u64),
        ("reported_tcb_version", u64),
    ]


class sev_user_data_snp_config(Structure):
    """SNP_SET_CONFIG."""

    _pack_ = 1
    _fields_ = [
        ("reported_tcb", u64),
        ("mask_chip_id", u32, 1),
        ("mask_chip_key", u32, 1),
        ("rsvd", u32, 30),
        ("rsvd1", u8 * 52),
    ]


class sev_user_data_snp_vlek_load(Structure):
    """SNP_VLEK_LOAD."""

    _pack_ = 1
    _fields_ = [("len", u32), ("vlek_wrapped_version", u8), ("rsvd", u8 * 3), ("vlek_wrapped_address", u64)]


SEV_IOC_TYPE = ord("S")
SEV_ISSUE_CMD = _IOWR(SEV_IOC_TYPE, 0x0, sev_issue_cmd)


def ret_name(code: int) -> str:
    """Name of a firmware status without SEV_RET_, or the number itself.

    >>> ret_name(0xB), ret_name(0x1E)
    ('BAD_MEASUREMENT', 'status 0x1e')
    """
    return RET_NAMES.get(code & 0xFFFF_FFFF, f"status {code:#x}")
