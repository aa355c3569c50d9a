"""`SevPlatform`: /dev/sev, the platform's side of SEV. Status, keys and certificates; guests are `Vm.sev_op`'s."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from errno import EACCES, EIO, EPERM

from kvmapi.abi import psp
from kvmapi.descriptor import Descriptor
from kvmapi.errors import KvmError, command_error, open_error
from kvmapi.host import Host
from kvmapi.rows import decode_struct
from kvmapi.table import command, named


@dataclass(frozen=True, slots=True)
class PlatformStatus:
    """SEV_PLATFORM_STATUS. API version and build go into every launch measurement."""

    api_major: int
    api_minor: int
    build: int
    state: int
    flags: int
    guest_count: int

    @property
    def state_name(self) -> str:
        """UNINIT, INIT or WORKING."""
        return psp.PLATFORM_STATE_NAMES.get(self.state, f"state {self.state}?")

    @property
    def es(self) -> bool:
        """The platform is initialised for SEV-ES."""
        return bool(self.flags & psp.SEV_STATUS_FLAGS_CONFIG_ES)

    @property
    def owned(self) -> bool:
        """Someone else than the platform itself owns it."""
        return bool(self.flags & psp.SEV_STATUS_FLAGS_OWNED)


class SevPlatform(Descriptor):
    """/dev/sev of a host; raises `HostError` with a remedy if there is none.

    It is opened for writing if that is allowed; without, the commands that change the platform raise EPERM.
    """

    on = "sev"

    def __init__(self, host: Host, path: str = "/dev/sev") -> None:
        super().__init__(host, _open(host, path))

    def issue(self, cmd: int, data: ctypes.Structure | None = None) -> None:
        """Run a SEV_* or SNP_* command; `data` is written back in place, also when the command fails."""
        argument = psp.sev_issue_cmd(cmd=cmd, data=0 if data is None else ctypes.addressof(data), error=psp.SEV_RET_NO_FW_CALL)
        result = self.ioctl_raw(psp.SEV_ISSUE_CMD, ctypes.addressof(argument))
        if result < 0:
            known = command(psp.SEV_ISSUE_CMD, cmd)
            reached = result == -EIO and argument.error not in (psp.SEV_RET_NO_FW_CALL, psp.SEV_RET_SUCCESS)
            raise command_error(
                named("SEV_ISSUE_CMD"),
                known.name if known else f"SEV command {cmd}",
                -result,
                {} if data is None else decode_struct(data),
                argument.error if reached else None,
            )

    def status(self) -> PlatformStatus:
        """Version, state and number of guests."""
        data = psp.sev_user_data_status()
        self.issue(psp.SEV_PLATFORM_STATUS, data)
        return PlatformStatus(data.api_major, data.api_minor, data.build, data.state, data.flags, data.guest_count)

    def pdh_cert_export(self) -> tuple[bytes, bytes]:
        """The platform's Diffie-Hellman certificate (2084 bytes), and its chain PEK, OCA, CEK (three more).

        Hardware exports its CEK without AMD's signature; the signed one is AMD's to give, by `get_id`.
        """
        data = psp.sev_user_data_pdh_cert_export()
        self._query_length(psp.SEV_PDH_CERT_EXPORT, data)
        pdh = ctypes.create_string_buffer(data.pdh_cert_len)
        chain = ctypes.create_string_buffer(data.cert_chain_len)
        data.pdh_cert_address, data.cert_chain_address = ctypes.addressof(pdh), ctypes.addressof(chain)
        self.issue(psp.SEV_PDH_CERT_EXPORT, data)
        return pdh.raw[: data.pdh_cert_len], chain.raw[: data.cert_chain_len]

    def get_id(self) -> bytes:
        """The chip's unique id (64 bytes per socket): what AMD's key server knows its certificate by. Needs API 0.16 (ENOTSUPP)."""
        data = psp.sev_user_data_get_id2()
        self._query_length(psp.SEV_GET_ID2, data)
        buffer = ctypes.create_string_buffer(data.length)
        data.address = ctypes.addressof(buffer)
        self.issue(psp.SEV_GET_ID2, data)
        return buffer.raw[: data.length]

    # ---- what changes the platform: EPERM unless /dev/sev could be opened for writing
    def factory_reset(self) -> None:
        """Forget the owner; new OCA, PEK and PDH. The platform is uninitialised afterwards. EBUSY while it has guests."""
        self.issue(psp.SEV_FACTORY_RESET)

    def pek_gen(self) -> None:
        """A new platform endorsement key, and a new PDH; the platform owns itself again. INVALID_PLATFORM_STATE while it has guests."""
        self.issue(psp.SEV_PEK_GEN)

    def pdh_gen(self) -> None:
        """A new Diffie-Hellman key: sessions that owners made for the old one are worthless."""
        self.issue(psp.SEV_PDH_GEN)

    def pek_csr(self) -> bytes:
        """A request for a certificate of the platform endorsement key (2084 bytes), for an owner to sign. Not while there are guests."""
        data = psp.sev_user_data_pek_csr()
        self._query_length(psp.SEV_PEK_CSR, data)
        buffer = ctypes.create_string_buffer(data.length)
        data.address = ctypes.addressof(buffer)
        self.issue(psp.SEV_PEK_CSR, data)
        return buffer.raw[: data.length]

    def pek_cert_import(self, pek: bytes, oca: bytes) -> None:
        """Give the platform an owner: `pek` is the request of `pek_csr`, signed; `oca` the owner's self-signed certificate.

        Firmware statuses: ALREADY_OWNED (`pek_gen` or `factory_reset` first), INVALID_CERTIFICATE, BAD_SIGNATURE. EINVAL for
        empty certificates and those above 16 KiB.
        """
        pek_buffer, oca_buffer = ctypes.create_string_buffer(pek, len(pek) or 1), ctypes.create_string_buffer(oca, len(oca) or 1)
        data = psp.sev_user_data_pek_cert_import(ctypes.addressof(pek_buffer), len(pek), ctypes.addressof(oca_buffer), len(oca))
        self.issue(psp.SEV_PEK_CERT_IMPORT, data)

    def _query_length(self, cmd: int, data: ctypes.Structure) -> None:
        """Issue a command with empty buffers: the firmware says INVALID_LEN and writes the lengths it wants."""
        try:
            self.issue(cmd, data)
        except KvmError as error:
            if error.fw_error != psp.SEV_RET_INVALID_LEN:
                raise


def _open(host: Host, path: str) -> int:
    try:
        return host.open(path, os.O_RDWR)
    except OSError as error:
        if error.errno not in (EACCES, EPERM):
            raise open_error(path, error.errno or 0) from error
    try:
        return host.open(path, os.O_RDONLY)
    except OSError as error:
        raise open_error(path, error.errno or 0) from error
