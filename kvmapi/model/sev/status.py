"""How the firmware says no: a status code (SEV_RET_*), which KVM passes on beside EIO."""

from __future__ import annotations

from kvmapi.abi import psp


class FirmwareError(Exception):
    """The command failed with this SEV_RET_* status; nothing has changed."""

    def __init__(self, status: int) -> None:
        super().__init__(psp.RET_NAMES.get(status, hex(status)))
        self.status = status
