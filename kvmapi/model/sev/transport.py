"""The firmware's half of the transport cryptography: sessions and packets, with keys that stay in the vault.

What an owner, or another platform's firmware, wraps with `kvmapi.session_crypto` is opened here, and the other way
round for SEND_START and SEND_UPDATE_DATA. The formulas are that module's; what differs is where the results go: TEK
and TIK straight into the vault, plaintext through the vault's page, every transient key overwritten.

A packet is a header (flags, IV, MAC: 52 bytes) and ciphertext. Its MAC covers one byte that says which command it is
for (1 LAUNCH_SECRET, 2 SEND/RECEIVE_UPDATE_DATA), so a packet of one kind is none of the other. Source: launch-measurement
facts §3, §4; the context byte 2 is from the firmware's specification as its readers describe it, unconfirmed on hardware.
"""

from __future__ import annotations

import hmac
import os
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from kvmapi import session_crypto as crypto
from kvmapi.abi import cert, psp
from kvmapi.model.mem.cipher import SLACK, Buffer
from kvmapi.model.sev.status import FirmwareError
from kvmapi.wiping import wipe

if TYPE_CHECKING:
    from kvmapi.model.sev.vault import Secret, Vault

CONTEXT_SECRET, CONTEXT_DATA = 0x01, 0x02
KEYS_SIZE = 2 * crypto.KEY_SIZE
HEADER_SIZE = cert.SEV_SECRET_HEADER_SIZE
_HEAD = 20  # flags and IV: what the header's MAC covers of it


def _ctr(key: memoryview, iv: bytes, data: Buffer, out: memoryview) -> None:
    """AES-128-CTR of `data` into `out`, which is SLACK bytes longer."""
    Cipher(algorithms.AES(key), modes.CTR(iv)).encryptor().update_into(data, out)


class Transport:
    """TEK and TIK of one guest."""

    __slots__ = ("_tek", "_tik", "_vault")

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._tek: Secret = vault.hold(crypto.KEY_SIZE)
        try:
            self._tik: Secret = vault.hold(crypto.KEY_SIZE)
        except FirmwareError:
            self._tek.release()
            raise

    def __repr__(self) -> str:
        return "Transport(keys never shown)"

    def __reduce__(self) -> str:
        raise TypeError("transport keys never leave the model's firmware")

    def draw(self) -> None:
        """New keys that nobody else knows."""
        self._tek.fill_random()
        self._tik.fill_random()

    def forget(self) -> None:
        """Wipe both keys."""
        self._tek.release()
        self._tik.release()

    # ---- sessions
    def open_session(self, session: bytes, z: bytes | bytearray, policy: int) -> None:
        """Take the keys of a 128-byte session that was made with the shared secret `z` for `policy`.

        INVALID_LEN for another length, BAD_MEASUREMENT when a MAC is wrong: the keys are as they were then.
        """
        if len(session) != cert.SEV_SESSION_SIZE:
            raise FirmwareError(psp.SEV_RET_INVALID_LEN)
        blob = cert.sev_session.from_buffer_copy(session)
        wrapped = bytes(blob.wrap_tk)
        kek, kik = crypto.wrapping_keys(z, bytes(blob.nonce))
        try:
            if not hmac.compare_digest(crypto.mac(kik, wrapped), bytes(blob.wrap_mac)):
                raise FirmwareError(psp.SEV_RET_BAD_MEASUREMENT)
            with self._vault.working() as work:
                room = work.hidden[: KEYS_SIZE + SLACK]
                _ctr(memoryview(kek), bytes(blob.wrap_iv), wrapped, room)
                tek, tik = room[: crypto.KEY_SIZE], room[crypto.KEY_SIZE : KEYS_SIZE]
                if not hmac.compare_digest(_policy_mac(tik, policy), bytes(blob.policy_mac)):
                    raise FirmwareError(psp.SEV_RET_BAD_MEASUREMENT)
                self._tek.set(tek)
                self._tik.set(tik)
        finally:
            wipe(kek)
            wipe(kik)

    def make_session(self, z: bytes | bytearray, policy: int) -> bytes:
        """The keys, wrapped for the firmware with which `z` is shared: 128 bytes."""
        nonce, iv = os.urandom(16), os.urandom(16)
        kek, kik = crypto.wrapping_keys(z, nonce)
        wrapped = bytearray(KEYS_SIZE + SLACK)
        try:
            with self._vault.working() as work:
                room = work.hidden[:KEYS_SIZE]
                room[: crypto.KEY_SIZE], room[crypto.KEY_SIZE :] = self._tek.view, self._tik.view
                _ctr(memoryview(kek), iv, room, memoryview(wrapped))
                mac = _policy_mac(self._tik.view, policy)
            ciphertext = bytes(wrapped[:KEYS_SIZE])
            return nonce + ciphertext + iv + crypto.mac(kik, ciphertext) + mac
        finally:
            wipe(kek)
            wipe(kik)

    # ---- MACs and packets
    def mac(self, message: bytes) -> bytes:
        """HMAC-SHA256 with TIK."""
        with self._vault.opened():
            return hmac.digest(self._tik.view, message, "sha256")

    def _packet_mac(self, context: int, head: bytes, guest_len: int, trans: Buffer, measure: bytes) -> bytes:
        lengths = guest_len.to_bytes(4, "little") + len(trans).to_bytes(4, "little")
        return self.mac(bytes((context,)) + head + lengths + bytes(trans) + measure)

    def check_packet(self, context: int, header: bytes, trans: bytes, guest_len: int, measure: bytes = b"") -> None:
        """Does the packet's MAC say that it is for this command and these lengths? BAD_MEASUREMENT if not, INVALID_PARAM for
        reserved flags, UNSUPPORTED for a compressed packet.
        """
        if len(header) != HEADER_SIZE or not trans or len(trans) != guest_len:
            raise FirmwareError(psp.SEV_RET_INVALID_LEN)
        if not hmac.compare_digest(self._packet_mac(context, header[:_HEAD], guest_len, trans, measure), header[_HEAD:]):
            raise FirmwareError(psp.SEV_RET_BAD_MEASUREMENT)
        flags = int.from_bytes(header[:4], "little")
        if flags & ~cert.SEV_SECRET_FLAG_COMPRESSED:
            raise FirmwareError(psp.SEV_RET_INVALID_PARAM)
        if flags:
            raise FirmwareError(psp.SEV_RET_UNSUPPORTED)

    def decrypt(self, header: bytes, trans: bytes, out: memoryview) -> None:
        """A checked packet's plaintext into vault memory, `out` being SLACK bytes longer. The vault is open."""
        _ctr(self._tek.view, header[4:_HEAD], trans, out)

    def encrypt(self, context: int, plain: memoryview) -> tuple[bytes, bytes]:
        """A packet with `plain`, which stands in vault memory; the vault is open. (header, ciphertext)"""
        iv = os.urandom(16)
        out = bytearray(len(plain) + SLACK)
        _ctr(self._tek.view, iv, plain, memoryview(out))
        trans = bytes(memoryview(out)[: len(plain)])
        head = bytes(4) + iv
        return head + self._packet_mac(context, head, len(trans), trans, b""), trans


def _policy_mac(tik: memoryview, policy: int) -> bytes:
    return hmac.digest(tik, policy.to_bytes(4, "little"), "sha256")
