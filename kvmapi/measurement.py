"""The launch measurement, computed by the owner: what the firmware should answer to LAUNCH_MEASURE.

    digest  = SHA-256 of the plaintext of every LAUNCH_UPDATE_DATA region, then of every VMSA page, in command order
    measure = HMAC-SHA256(TIK, 04 | api_major | api_minor | build | policy | digest | nonce)

Only bytes are hashed, no addresses and no lengths: splitting a region changes nothing, order changes everything.
Firmware before API 0.17 leaves out the first four bytes. Sources: AMD's SEV tool, virtee's sev crate.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Self

VMSA_SIZE = 4096
UPDATE_ALIGNMENT = 16
_CONTEXT_MEASURE = 0x04
VERSION_IN_MAC = (0, 17)
"""Firmware of this API version or later has it in its MACs: the version in the measurement, the measurement in secret packets."""

Readable = bytes | bytearray | memoryview


class LaunchDigest:
    """The launch digest, built in the order in which the launch commands are issued.

    >>> LaunchDigest().hexdigest()[:16]
    'e3b0c44298fc1c14'
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update_data(self, data: Readable) -> Self:
        """Add one LAUNCH_UPDATE_DATA region: its plaintext, a multiple of 16 bytes."""
        if len(data) % UPDATE_ALIGNMENT:
            raise ValueError(f"the firmware takes multiples of {UPDATE_ALIGNMENT} bytes, not {len(data)}")
        self._hash.update(data)
        return self

    def update_vmsa(self, page: Readable) -> Self:
        """Add one vCPU's VMSA page; vCPUs come in the order in which they were created."""
        if len(page) != VMSA_SIZE:
            raise ValueError(f"a VMSA has {VMSA_SIZE} bytes, not {len(page)}")
        self._hash.update(page)
        return self

    def digest(self) -> bytes:
        """32 bytes; more may be added afterwards."""
        return self._hash.digest()

    def hexdigest(self) -> str:
        """The same in hex."""
        return self._hash.hexdigest()

    def copy(self) -> LaunchDigest:
        """An independent digest of what was added so far."""
        other = LaunchDigest()
        other._hash = self._hash.copy()
        return other


def expected_measure(tik: bytes, digest: bytes, nonce: bytes, *, policy: int, api_major: int, api_minor: int, build: int) -> bytes:
    """The 32-byte MAC that the firmware should return with `nonce` (16 bytes).

    `api_major`, `api_minor` and `build` are the platform's (SEV_PLATFORM_STATUS), `policy` that of LAUNCH_START.
    """
    message = policy.to_bytes(4, "little") + digest + nonce
    if (api_major, api_minor) >= VERSION_IN_MAC:
        message = bytes((_CONTEXT_MEASURE, api_major, api_minor, build)) + message
    return hmac.digest(tik, message, "sha256")


def same(a: bytes, b: bytes) -> bool:
    """Compare two MACs without telling by the time where they differ."""
    return hmac.compare_digest(a, b)
