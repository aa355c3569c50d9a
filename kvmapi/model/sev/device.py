"""/dev/sev: the platform commands of SEV_ISSUE_CMD.

The driver (drivers/crypto/ccp/sev-dev.c) checks writability, copies and lengths and answers with errno; the firmware
answers with a status: EIO, and the status in `error`. Each handler checks in the driver's order.

    write-back   `sev_issue_cmd` is written back for every command that exists, whatever came of it; `error` changes only when
                 the firmware was reached. A command's own struct is written back where it carries lengths, also when the firmware refused.
    state        commands that need INIT initialise an uninitialised platform for their own time. The driver holds one mutex
                 during a command, which those of KVM take too: here it is the firmware's lock.
    SNP          the modelled firmware (API 0.24) knows no SNP command: INVALID_COMMAND; what the driver asks first, it asks here.
"""

from __future__ import annotations

import contextlib
import errno
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmapi.abi import psp, sev
from kvmapi.model.caller import Errno
from kvmapi.model.files import File
from kvmapi.model.sev.guest import API_MAJOR, API_MINOR, BUILD
from kvmapi.model.sev.status import FirmwareError

if TYPE_CHECKING:
    from kvmapi.model.caller import Caller
    from kvmapi.model.platform import Platform
    from kvmapi.model.sev.firmware import Firmware

_ISSUE = struct.Struct("<IQI")
_STATUS = struct.Struct("<BBBIBI")
_ONE_BLOB = struct.Struct("<QI")
_TWO_BLOBS = struct.Struct("<QIQI")
_LARGEST_ALLOCATION = 4 << 20  # kmalloc: PAGE_SIZE << MAX_PAGE_ORDER


@dataclass(slots=True)
class _Call:
    """One SEV_ISSUE_CMD on its way through the driver."""

    data: int
    error: int
    caller: Caller

    def read(self, layout: struct.Struct) -> tuple[int, ...]:
        """The command's own struct."""
        return layout.unpack(self.caller.memory.read(self.data, layout.size))

    def write(self, at: int, content: bytes) -> None:
        """To the caller."""
        self.caller.memory.write(at, content)

    def blob(self, at: int, size: int) -> bytes:
        """psp_copy_user_blob."""
        if not at or not size or size > sev.SEV_FW_BLOB_MAX_SIZE:
            raise Errno(errno.EINVAL)
        return self.caller.memory.read(at, size)


class SevDevice(File):
    """One open of /dev/sev."""

    kind = "sev"

    def __init__(self, platform: Platform, *, writable: bool) -> None:
        super().__init__()
        self._platform = platform
        self._writable = writable
        self.handlers = {psp.SEV_ISSUE_CMD: self._issue}
        self._commands: dict[int, Callable[[_Call, Firmware], None]] = {
            psp.SEV_FACTORY_RESET: self._factory_reset,
            psp.SEV_PLATFORM_STATUS: self._platform_status,
            psp.SEV_PEK_GEN: self._pek_gen,
            psp.SEV_PEK_CSR: self._pek_csr,
            psp.SEV_PDH_GEN: self._pdh_gen,
            psp.SEV_PDH_CERT_EXPORT: self._pdh_cert_export,
            psp.SEV_PEK_CERT_IMPORT: self._pek_cert_import,
            psp.SEV_GET_ID: self._get_id,
            psp.SEV_GET_ID2: self._get_id2,
            psp.SNP_PLATFORM_STATUS: self._snp_platform_status,
            psp.SNP_COMMIT: self._snp_commit,
            psp.SNP_SET_CONFIG: self._snp_of_an_initialised_platform,
            psp.SNP_VLEK_LOAD: self._snp_of_an_initialised_platform,
        }

    def unknown_errno(self) -> int:
        return errno.EINVAL

    def _issue(self, arg: int, caller: Caller) -> int:
        number, data, error = _ISSUE.unpack(caller.memory.read(arg, _ISSUE.size))
        handler = self._commands.get(number)
        if handler is None:
            raise Errno(errno.EINVAL)
        firmware, call, failed = self._platform.firmware, _Call(data, error, caller), 0
        with firmware.lock:
            try:
                handler(call, firmware)
            except FirmwareError as refusal:
                call.error, failed = refusal.status, errno.EIO
            except Errno as refusal:
                failed = refusal.number
        caller.memory.write(arg, _ISSUE.pack(number, data, call.error))
        if failed:
            raise Errno(failed)
        return 0

    def _need_write(self) -> None:
        if not self._writable:
            raise Errno(errno.EPERM)

    @contextlib.contextmanager
    def _initialised(self, call: _Call, firmware: Firmware) -> Iterator[None]:
        """Run firmware commands that need INIT; what was uninitialised is so again afterwards."""
        if firmware.state != psp.SEV_PLATFORM_UNINIT:
            yield
            return
        firmware.init()
        call.error = psp.SEV_RET_SUCCESS
        try:
            yield
        finally:
            firmware.shutdown()

    # ---- the platform
    def _factory_reset(self, call: _Call, firmware: Firmware) -> None:
        self._need_write()
        state, call.error = firmware.state, psp.SEV_RET_SUCCESS
        if state == psp.SEV_PLATFORM_WORKING:
            raise Errno(errno.EBUSY)
        if state == psp.SEV_PLATFORM_INIT:
            firmware.shutdown()
        firmware.factory_reset()

    def _platform_status(self, call: _Call, firmware: Firmware) -> None:
        flags = psp.SEV_STATUS_FLAGS_OWNED if firmware.identity.owned else 0
        flags |= psp.SEV_STATUS_FLAGS_CONFIG_ES if firmware.es_enabled else 0
        call.error = psp.SEV_RET_SUCCESS
        call.write(call.data, _STATUS.pack(API_MAJOR, API_MINOR, firmware.state, flags, BUILD, firmware.guest_count))

    def _pek_gen(self, call: _Call, firmware: Firmware) -> None:
        self._need_write()
        with self._initialised(call, firmware):
            firmware.pek_gen()
        call.error = psp.SEV_RET_SUCCESS

    def _pdh_gen(self, call: _Call, firmware: Firmware) -> None:
        self._need_write()
        with self._initialised(call, firmware):
            firmware.pdh_gen()
        call.error = psp.SEV_RET_SUCCESS

    # ---- certificates
    def _pek_csr(self, call: _Call, firmware: Firmware) -> None:
        self._need_write()
        address, room = call.read(_ONE_BLOB)
        query = not address or not room
        if not query and room > sev.SEV_FW_BLOB_MAX_SIZE:
            raise Errno(errno.EFAULT)
        with self._initialised(call, firmware):
            self._one_blob(call, address, 0 if query else room, firmware.pek_csr)

    def _pdh_cert_export(self, call: _Call, firmware: Firmware) -> None:
        pdh_at, pdh_room, chain_at, chain_room = call.read(_TWO_BLOBS)
        if not (pdh_at and pdh_room and chain_at and chain_room):
            pdh_room = chain_room = 0
        elif max(pdh_room, chain_room) > sev.SEV_FW_BLOB_MAX_SIZE:
            raise Errno(errno.EFAULT)
        if firmware.state == psp.SEV_PLATFORM_UNINIT:
            self._need_write()
        with self._initialised(call, firmware):
            try:
                pdh, chain = firmware.pdh_cert_export()
                fits = pdh_room >= len(pdh) and chain_room >= len(chain)
                pdh_room, chain_room = len(pdh), len(chain)
                call.error = psp.SEV_RET_SUCCESS if fits else psp.SEV_RET_INVALID_LEN
            except FirmwareError as refusal:
                call.error = refusal.status
            call.write(call.data, _TWO_BLOBS.pack(pdh_at, pdh_room, chain_at, chain_room))
            if call.error != psp.SEV_RET_SUCCESS:
                raise FirmwareError(call.error)
            call.write(pdh_at, pdh)
            call.write(chain_at, chain)

    def _pek_cert_import(self, call: _Call, firmware: Firmware) -> None:
        self._need_write()
        pek_at, pek_size, oca_at, oca_size = call.read(_TWO_BLOBS)
        pek = call.blob(pek_at, pek_size)
        oca = call.blob(oca_at, oca_size)
        with self._initialised(call, firmware):
            firmware.pek_cert_import(pek, oca)
        call.error = psp.SEV_RET_SUCCESS

    def _one_blob(self, call: _Call, address: int, room: int, produce: Callable[[], bytes]) -> None:
        """A firmware command with one buffer, `room` 0 asking for its length: what is needed or was written goes back either way."""
        try:
            content = produce()
            call.error = psp.SEV_RET_SUCCESS if room >= len(content) else psp.SEV_RET_INVALID_LEN
            room = len(content)
        except FirmwareError as refusal:
            call.error = refusal.status
        call.write(call.data, _ONE_BLOB.pack(address, room))
        if call.error != psp.SEV_RET_SUCCESS:
            raise FirmwareError(call.error)
        call.write(address, content)

    # ---- the chip
    def _get_id(self, call: _Call, firmware: Firmware) -> None:
        """Deprecated: room for two sockets is assumed, and as many ids written as the platform has."""
        chip_id = firmware.get_id()
        call.error = psp.SEV_RET_SUCCESS
        call.write(call.data, chip_id)

    def _get_id2(self, call: _Call, firmware: Firmware) -> None:
        address, room = call.read(_ONE_BLOB)
        query = not address or not room
        if not query and room > _LARGEST_ALLOCATION:
            raise Errno(errno.ENOMEM)
        self._one_blob(call, address, 0 if query else room, firmware.get_id)

    # ---- SNP, which this firmware does not have
    def _snp_platform_status(self, call: _Call, _firmware: Firmware) -> None:
        if not call.data:
            raise Errno(errno.EINVAL)
        raise FirmwareError(psp.SEV_RET_INVALID_COMMAND)

    def _snp_commit(self, _call: _Call, _firmware: Firmware) -> None:
        raise FirmwareError(psp.SEV_RET_INVALID_COMMAND)

    def _snp_of_an_initialised_platform(self, call: _Call, _firmware: Firmware) -> None:
        """SNP_SET_CONFIG, SNP_VLEK_LOAD: the driver asks whether SNP was initialised before it reads anything."""
        if not call.data:
            raise Errno(errno.EINVAL)
        self._need_write()
        raise Errno(errno.ENODEV)
