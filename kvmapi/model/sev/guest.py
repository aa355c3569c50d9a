"""The firmware's record of one guest (GCTX), and the commands that concern one guest.

    UNINIT -> LAUNCH_UPDATE -> LAUNCH_SECRET -> RUNNING <-> SEND_UPDATE -> SENT
    UNINIT -> RECEIVE_UPDATE -> RUNNING

Each command checks first and changes last: a `FirmwareError` leaves guest, memory and state as they were. Commands
take and give ciphertext of guest memory and never a pointer to it; plaintext of a command stands in the vault,
for the time of the command, or (DBG_DECRYPT, whose purpose that is) in the answer.

Which commands a state allows follows the table in AMD's sev-tool; for DBG_* and ATTESTATION it says nothing, and they are
allowed whenever there is a memory key, respectively a final digest. docs/fidelity.md lists what no hardware confirmed.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from typing import TYPE_CHECKING

from kvmapi.abi import cert, psp, sev
from kvmapi.model.caller import PAGE
from kvmapi.model.mem.cipher import SLACK, UNIT, Buffer, PageCipher
from kvmapi.model.sev.status import FirmwareError
from kvmapi.model.sev.transport import CONTEXT_DATA, CONTEXT_SECRET, HEADER_SIZE, Transport

if TYPE_CHECKING:
    from kvmapi.model.sev.identity import Identity
    from kvmapi.model.sev.vault import Vault

API_MAJOR, API_MINOR, BUILD = 0, 24, 15
MEASURE_SIZE = sev.MEASURE_SIZE
SESSION_SIZE = cert.SEV_SESSION_SIZE
PACKET_HEADER_SIZE = HEADER_SIZE
REPORT_SIZE = cert.SEV_ATTESTATION_REPORT_SIZE
VMSA_SIZE = PAGE
_MEASURE_CONTEXT = 0x04
_BLOCK = 16
_MAC_SIZE = 32
_SIGNED = 52  # what an attestation report's signature covers: nonce, digest, policy
_MEASURED = (sev.SEV_STATE_LAUNCH_SECRET, sev.SEV_STATE_RUNNING, sev.SEV_STATE_SEND_UPDATE)


class GuestContext:
    """One guest: `handle` (never 0), `policy`, `state` (SEV_STATE_*), `asid` (None while inactive), `cipher`."""

    __slots__ = ("__identity", "__transport", "__vault", "_digest", "_measure", "asid", "cipher", "handle", "policy", "state")

    def __init__(
        self, handle: int, policy: int, state: int, vault: Vault, transport: Transport, cipher: PageCipher, identity: Identity
    ) -> None:
        self.handle = handle
        self.policy = policy
        self.state = state
        self.asid: int | None = None
        self.cipher = cipher
        self._digest = hashlib.sha256()
        self._measure = b""
        self.__vault = vault
        self.__transport = transport
        self.__identity = identity

    def __repr__(self) -> str:
        return f"GuestContext(handle={self.handle}, policy={self.policy:#x}, state={sev.state_name(self.state)})"

    def __reduce__(self) -> str:
        raise TypeError("a guest context never leaves the model's firmware")

    def require(self, *states: int) -> None:
        """The command is legal only in these states, and for a guest that has an ASID."""
        if self.asid is None:
            raise FirmwareError(psp.SEV_RET_INACTIVE)
        if self.state not in states:
            raise FirmwareError(psp.SEV_RET_INVALID_GUEST_STATE)

    def forget(self) -> None:
        """DECOMMISSION: the keys are gone; memory stays ciphertext for ever."""
        self.__transport.forget()
        self.cipher.forget()
        self.state, self.asid = sev.SEV_STATE_UNINIT, None

    # ---- launch
    def check_update(self, address: int, size: int) -> None:
        """LAUNCH_UPDATE_DATA's own checks: state, then alignment to 16 bytes."""
        self.require(sev.SEV_STATE_LAUNCH_UPDATE)
        _check_blocks(address, size)

    def measure_data(self, plain: Buffer) -> None:
        """Add plaintext to the launch digest; `check_update` has been asked."""
        self._digest.update(plain)

    def update_data(self, address: int, plain: Buffer) -> bytes:
        """LAUNCH_UPDATE_DATA of a few pages: measure the plaintext, return the ciphertext for the same place."""
        self.check_update(address, len(plain))
        self.measure_data(plain)
        return self.cipher.encrypt(address, plain)

    def update_vmsa(self, page: bytes) -> None:
        """LAUNCH_UPDATE_VMSA: measure one vCPU's save area. An SEV-ES policy is what makes it legal (INVALID_GUEST otherwise)."""
        self.require(sev.SEV_STATE_LAUNCH_UPDATE)
        if not self.policy & sev.SEV_POLICY_ES:
            raise FirmwareError(psp.SEV_RET_INVALID_GUEST)
        if len(page) != VMSA_SIZE:
            raise FirmwareError(psp.SEV_RET_INVALID_LEN)
        self._digest.update(page)

    def measure(self) -> bytes:
        """LAUNCH_MEASURE: 32 bytes of MAC and the 16-byte nonce; the guest can take secrets from now on."""
        self.require(sev.SEV_STATE_LAUNCH_UPDATE)
        nonce = os.urandom(16)
        head = bytes((_MEASURE_CONTEXT, API_MAJOR, API_MINOR, BUILD)) + self.policy.to_bytes(4, "little")
        self._measure = self.__transport.mac(head + self._digest.digest() + nonce)
        self.state = sev.SEV_STATE_LAUNCH_SECRET
        return self._measure + nonce

    def launch_secret(self, address: int, header: bytes, trans: bytes, guest_len: int) -> bytes:
        """LAUNCH_SECRET: open the owner's packet; the `guest_len` bytes of ciphertext that belong to `address`, in one page."""
        self.require(sev.SEV_STATE_LAUNCH_SECRET)
        _check_page_part(address, guest_len)
        self.__transport.check_packet(CONTEXT_SECRET, header, trans, guest_len, self._measure)
        return self._unwrap(address, header, trans)

    def finish(self) -> None:
        """LAUNCH_FINISH."""
        self.require(sev.SEV_STATE_LAUNCH_SECRET)
        self.state = sev.SEV_STATE_RUNNING

    def attestation_report(self, mnonce: bytes) -> bytes:
        """GET_ATTESTATION_REPORT: 208 bytes, the digest and policy beside the asker's nonce, signed by the PEK."""
        self.require(*_MEASURED)
        report = cert.sev_attestation_report(policy=self.policy, sig_usage=cert.SEV_USAGE_PEK, sig_algo=cert.SEV_ALGO_ECDSA_SHA256)
        report.mnonce[:], report.launch_digest[:] = mnonce, self._digest.digest()
        report.sig1[:] = self.__identity.sign_with_pek(ctypes.string_at(ctypes.addressof(report), _SIGNED))
        return bytes(report)

    # ---- sending
    def send_start(self, pdh: bytes, plat_certs: bytes, amd_certs: bytes) -> bytes:
        """SEND_START: check the destination's certificates as the policy wants, and wrap new transport keys for it: a 128-byte session."""
        self.require(sev.SEV_STATE_RUNNING)
        if self.policy & sev.SEV_POLICY_NOSEND:
            raise FirmwareError(psp.SEV_RET_POLICY_FAILURE)
        self.__identity.validate_peer(plat_certs, amd_certs, pdh, self.policy)
        z = self.__identity.shared_secret(pdh)
        try:
            self.__transport.draw()
            session = self.__transport.make_session(z, self.policy)
        finally:
            z[:] = bytes(len(z))
        self.state = sev.SEV_STATE_SEND_UPDATE
        return session

    def send_update_data(self, address: int, ciphertext: bytes) -> tuple[bytes, bytes]:
        """SEND_UPDATE_DATA: memory at `address`, within one page, as a packet for the destination: (header, trans)."""
        self.require(sev.SEV_STATE_SEND_UPDATE)
        _check_page_part(address, len(ciphertext))
        with self.__vault.working() as work:
            return self.__transport.encrypt(CONTEXT_DATA, self.cipher.decrypt_part(address, ciphertext, work))

    def send_finish(self) -> None:
        """SEND_FINISH: this copy of the guest never runs again."""
        self.require(sev.SEV_STATE_SEND_UPDATE)
        self.state = sev.SEV_STATE_SENT

    def send_cancel(self) -> None:
        """SEND_CANCEL: the guest runs on here; what was sent is worthless, as its keys are given up."""
        self.require(sev.SEV_STATE_SEND_UPDATE)
        self.__transport.draw()
        self.state = sev.SEV_STATE_RUNNING

    # ---- receiving
    def receive_update_data(self, address: int, header: bytes, trans: bytes, guest_len: int) -> bytes:
        """RECEIVE_UPDATE_DATA: open a packet of the source; the ciphertext that belongs to `address`, in one page."""
        self.require(sev.SEV_STATE_RECEIVE_UPDATE)
        _check_page_part(address, guest_len)
        self.__transport.check_packet(CONTEXT_DATA, header, trans, guest_len)
        return self._unwrap(address, header, trans)

    def receive_finish(self) -> None:
        """RECEIVE_FINISH."""
        self.require(sev.SEV_STATE_RECEIVE_UPDATE)
        self.state = sev.SEV_STATE_RUNNING

    def _unwrap(self, address: int, header: bytes, trans: bytes) -> bytes:
        """From the transport's ciphertext to memory's, with the plaintext in the vault only."""
        at = address % UNIT
        with self.__vault.working() as work:
            self.__transport.decrypt(header, trans, work.hidden[at : at + len(trans) + SLACK])
            return bytes(self.cipher.encrypt_part(address, work.hidden[at : at + len(trans)], work))

    # ---- debugging
    def _debuggable(self, address: int, size: int) -> None:
        if self.asid is None:
            raise FirmwareError(psp.SEV_RET_INACTIVE)
        if self.policy & sev.SEV_POLICY_NODBG:
            raise FirmwareError(psp.SEV_RET_POLICY_FAILURE)
        if self.state == sev.SEV_STATE_SENT:
            raise FirmwareError(psp.SEV_RET_INVALID_GUEST_STATE)
        _check_blocks(address, size)

    def dbg_decrypt(self, address: int, ciphertext: bytes) -> bytes:
        """DBG_DECRYPT: what stands at `address`, in the clear."""
        self._debuggable(address, len(ciphertext))
        return self.cipher.decrypt(address, ciphertext)

    def dbg_encrypt(self, address: int, plain: bytes) -> bytes:
        """DBG_ENCRYPT: `plain` as it must stand at `address`."""
        self._debuggable(address, len(plain))
        return self.cipher.encrypt(address, plain)


def _check_blocks(address: int, size: int) -> None:
    if address % _BLOCK:
        raise FirmwareError(psp.SEV_RET_INVALID_ADDRESS)
    if not size or size % _BLOCK:
        raise FirmwareError(psp.SEV_RET_INVALID_LEN)


def _check_page_part(address: int, size: int) -> None:
    _check_blocks(address, size)
    if address % PAGE + size > PAGE:
        raise FirmwareError(psp.SEV_RET_INVALID_LEN)
