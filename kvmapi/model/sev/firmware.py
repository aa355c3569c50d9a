"""The SEV firmware (PSP): platform state, identity keys, ASIDs, and one context per guest.

It answers in firmware status codes (SEV_RET_*), never in errno: those are KVM's. Guest secrets (TEK, TIK, the memory
key) stay in closures and private slots of GuestContext and are dropped at deactivation.

States of a guest: UNINIT -> LAUNCH_UPDATE -> LAUNCH_SECRET -> RUNNING. A command in the wrong state answers
INVALID_GUEST_STATE and changes nothing. Behaviour of firmware beyond what the kernel shows follows AMD's published
tools; what no hardware run has confirmed is listed in docs/fidelity.md.
"""

from __future__ import annotations

import hashlib
import os
import threading
from functools import cached_property

from kvmapi import session_crypto as crypto
from kvmapi.abi import cert, psp, sev
from kvmapi.model.mem.cipher import PageCipher

API_MAJOR, API_MINOR, BUILD = 0, 24, 15
_MEASURE_CONTEXT = 0x04
_BLOCK = 16


class FirmwareError(Exception):
    """The command failed with this SEV_RET_* status."""

    def __init__(self, status: int) -> None:
        super().__init__(psp.RET_NAMES.get(status, hex(status)))
        self.status = status


class Identity:
    """The platform's keys: PDH signed by PEK, PEK signed by OCA and CEK, OCA self-signed.

    The chip's key (CEK) would be signed by AMD; the model is no AMD part, so that slot stays marked as unsigned.
    """

    def __init__(self) -> None:
        algo, exchange = cert.SEV_ALGO_ECDSA_SHA256, cert.SEV_ALGO_ECDH_SHA256
        pdh, pek, oca, cek = (crypto.new_key() for _ in range(4))
        self._pdh = pdh
        certificates = [
            crypto.make_cert(key.public_key(), usage, exchange if usage == cert.SEV_USAGE_PDH else algo, API_MAJOR, API_MINOR)
            for key, usage in (
                (pdh, cert.SEV_USAGE_PDH),
                (pek, cert.SEV_USAGE_PEK),
                (oca, cert.SEV_USAGE_OCA),
                (cek, cert.SEV_USAGE_CEK),
            )
        ]
        crypto.sign_cert(certificates[0], pek, cert.SEV_USAGE_PEK)
        crypto.sign_cert(certificates[1], oca, cert.SEV_USAGE_OCA)
        crypto.sign_cert(certificates[1], cek, cert.SEV_USAGE_CEK)
        crypto.sign_cert(certificates[2], oca, cert.SEV_USAGE_OCA)
        self.pdh_certificate = bytes(certificates[0])
        self.chain = b"".join(bytes(certificate) for certificate in certificates[1:])

    def shared_secret(self, dh_certificate: bytes) -> bytes:
        """Z of the guest owner's certificate and our PDH; INVALID_CERTIFICATE for a certificate that is none."""
        try:
            return crypto.shared_secret(self._pdh, crypto.cert_key(crypto.parse_cert(dh_certificate)))
        except crypto.SessionError:
            raise FirmwareError(psp.SEV_RET_INVALID_CERTIFICATE) from None


class GuestContext:
    """The firmware's record of one guest."""

    __slots__ = ("__tek", "__tik", "_digest", "cipher", "handle", "policy", "state")

    def __init__(self, handle: int, policy: int, tek: bytes, tik: bytes) -> None:
        self.handle = handle
        self.policy = policy
        self.state = sev.SEV_STATE_LAUNCH_UPDATE
        self.cipher = PageCipher()
        self._digest = hashlib.sha256()
        self.__tek = tek  # wraps secrets and migration
        self.__tik = tik

    def __repr__(self) -> str:
        return f"GuestContext(handle={self.handle}, policy={self.policy:#x}, state={self.state})"

    def require(self, *states: int) -> None:
        """The command is legal only in these states."""
        if self.state not in states:
            raise FirmwareError(psp.SEV_RET_INVALID_GUEST_STATE)

    def update_data(self, address: int, plain: bytes) -> bytes:
        """LAUNCH_UPDATE_DATA: measure the plaintext, return the ciphertext for the same place."""
        self.require(sev.SEV_STATE_LAUNCH_UPDATE)
        if address % _BLOCK:
            raise FirmwareError(psp.SEV_RET_INVALID_ADDRESS)
        if len(plain) % _BLOCK:
            raise FirmwareError(psp.SEV_RET_INVALID_LEN)
        self._digest.update(plain)
        return self.cipher.encrypt(address, plain)

    def measure(self) -> bytes:
        """LAUNCH_MEASURE: 32 bytes of MAC and the 16-byte nonce; the guest can take secrets from now on."""
        self.require(sev.SEV_STATE_LAUNCH_UPDATE)
        nonce = os.urandom(16)
        head = bytes((_MEASURE_CONTEXT, API_MAJOR, API_MINOR, BUILD)) + self.policy.to_bytes(4, "little")
        result = crypto.mac(self.__tik, head + self._digest.digest() + nonce) + nonce
        self.state = sev.SEV_STATE_LAUNCH_SECRET
        return result

    def finish(self) -> None:
        """LAUNCH_FINISH."""
        self.require(sev.SEV_STATE_LAUNCH_SECRET)
        self.state = sev.SEV_STATE_RUNNING


class Firmware:
    """One platform. Thread-safe: guests of several VMs share it."""

    def __init__(self, asids: int) -> None:
        self._lock = threading.Lock()
        self._free_asids = list(range(asids, 0, -1))
        self._guests: dict[int, GuestContext] = {}
        self._next_handle = 1

    @cached_property
    def identity(self) -> Identity:
        """The platform's keys; drawn when first asked for (a launch without session needs none)."""
        return Identity()

    @property
    def state(self) -> int:
        """Platform state: KVM has initialised it; WORKING while guests exist."""
        return psp.SEV_PLATFORM_WORKING if self._guests else psp.SEV_PLATFORM_INIT

    @property
    def guest_count(self) -> int:
        return len(self._guests)

    # ---- ASIDs (KVM's side hands them out)
    def take_asid(self) -> int | None:
        """A free ASID, or None."""
        with self._lock:
            return self._free_asids.pop() if self._free_asids else None

    def give_asid(self, asid: int) -> None:
        with self._lock:
            self._free_asids.append(asid)

    # ---- guests
    def launch_start(self, policy: int, dh_certificate: bytes, session: bytes) -> GuestContext:
        """LAUNCH_START: a new guest, with the owner's keys if a session came along, else with keys nobody knows."""
        minimum = (policy >> sev.SEV_POLICY_API_MAJOR_SHIFT & 0xFF, policy >> sev.SEV_POLICY_API_MINOR_SHIFT & 0xFF)
        if minimum > (API_MAJOR, API_MINOR) or policy & sev.SEV_POLICY_ES:  # no ASID of the model can run an SEV-ES guest
            raise FirmwareError(psp.SEV_RET_POLICY_FAILURE)
        tek, tik = os.urandom(16), os.urandom(16)
        if session:
            if len(session) != cert.SEV_SESSION_SIZE:
                raise FirmwareError(psp.SEV_RET_INVALID_LEN)
            z = self.identity.shared_secret(dh_certificate)
            try:
                tek, tik = crypto.unwrap_session(session, z, policy)
            except crypto.SessionError:
                raise FirmwareError(psp.SEV_RET_BAD_MEASUREMENT) from None
        with self._lock:
            guest = GuestContext(self._next_handle, policy, tek, tik)
            self._guests[guest.handle] = guest
            self._next_handle += 1
        return guest

    def decommission(self, guest: GuestContext) -> None:
        """DEACTIVATE and DECOMMISSION: the guest and its keys are gone."""
        with self._lock:
            self._guests.pop(guest.handle, None)
