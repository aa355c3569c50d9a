"""/dev/sev of the model: SEV_ISSUE_CMD with PLATFORM_STATUS and PDH_CERT_EXPORT, which a launch with a guest owner
needs.

The other commands answer EINVAL, as the driver does for a command it does not handle.
Source: kvm-sev-uapi facts §9 (drivers/crypto/ccp/sev-dev.c).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable

from kvmapi.abi import psp, sev
from kvmapi.model.caller import Caller, Errno
from kvmapi.model.files import File
from kvmapi.model.platform import Platform
from kvmapi.model.sev.firmware import API_MAJOR, API_MINOR, BUILD, FirmwareError

_ISSUE = struct.Struct("<IQI")
_STATUS = struct.Struct("<BBBIBI")
_EXPORT = struct.Struct("<QIQI")


class SevDevice(File):
    """One open of /dev/sev."""

    kind = "sev"

    def __init__(self, platform: Platform, *, writable: bool) -> None:
        super().__init__()
        self._platform = platform
        self._writable = writable
        self.handlers = {psp.SEV_ISSUE_CMD: self._issue}
        self._commands: dict[int, Callable[[int, Caller], None]] = {
            psp.SEV_PLATFORM_STATUS: self._platform_status,
            psp.SEV_PDH_CERT_EXPORT: self._pdh_cert_export,
        }

    def unknown_errno(self) -> int:
        return errno.EINVAL

    def _issue(self, arg: int, caller: Caller) -> int:
        number, data, status = _ISSUE.unpack(caller.memory.read(arg, _ISSUE.size))
        handler = self._commands.get(number)
        if handler is None:
            raise Errno(errno.EINVAL)
        try:
            handler(data, caller)
            status = psp.SEV_RET_SUCCESS
        except FirmwareError as failure:
            status = failure.status
            raise Errno(errno.EIO) from None
        finally:
            caller.memory.write(arg, _ISSUE.pack(number, data, status))
        return 0

    def _platform_status(self, data: int, caller: Caller) -> None:
        firmware = self._platform.firmware
        caller.memory.write(data, _STATUS.pack(API_MAJOR, API_MINOR, firmware.state, 0, BUILD, firmware.guest_count))

    def _pdh_cert_export(self, data: int, caller: Caller) -> None:
        pdh_at, pdh_room, chain_at, chain_room = _EXPORT.unpack(caller.memory.read(data, _EXPORT.size))
        identity = self._platform.firmware.identity
        pdh, chain = identity.pdh_certificate, identity.chain
        query = not (pdh_at and pdh_room and chain_at and chain_room)
        if not query and max(pdh_room, chain_room) > sev.SEV_FW_BLOB_MAX_SIZE:
            raise Errno(errno.EFAULT)
        if query or pdh_room < len(pdh) or chain_room < len(chain):
            caller.memory.write(data, _EXPORT.pack(pdh_at, len(pdh), chain_at, len(chain)))
            raise FirmwareError(psp.SEV_RET_INVALID_LEN)
        caller.memory.write(pdh_at, pdh)
        caller.memory.write(chain_at, chain)
        caller.memory.write(data, _EXPORT.pack(pdh_at, len(pdh), chain_at, len(chain)))
