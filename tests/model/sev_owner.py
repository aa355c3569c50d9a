"""A guest owner beside the reference: makes sessions and packets, and judges those that a call really passes.

The formulas are `kvmapi.session_crypto`'s, whose published vectors have tests of their own.
"""

from __future__ import annotations

import hashlib

from kvmapi import certificates as certs
from kvmapi import session_crypto as crypto
from kvmapi.abi import cert as c
from tests.model.sev_reference import BAD_MAC, CERTIFICATE, LENGTH


class Owner:
    """One key pair for all guests; each session has keys of its own."""

    def __init__(self) -> None:
        self._private = certs.new_key()
        self.dh = bytes(certs.make_cert(self._private.public_key(), c.SEV_USAGE_PDH, c.SEV_ALGO_ECDH_SHA256))
        self._z = b""
        self._count = 0
        self._sessions: dict[bytes, tuple[int, bytes, bytes]] = {}

    def learn(self, pdh: bytes) -> None:
        """The platform's PDH as it is now; sessions for an older one are worthless."""
        self._z = bytes(certs.shared_secret(self._private, certs.cert_key(certs.parse_cert(pdh))))
        self._sessions.clear()

    def _bytes(self, what: str) -> bytes:
        self._count += 1
        return hashlib.sha256(f"{what} {self._count}".encode()).digest()[:16]

    def session(self, policy: int) -> bytes:
        """A new session for a guest with this policy."""
        tek, tik = self._bytes("tek"), self._bytes("tik")
        blob = crypto.wrap_session(self._z, tek, tik, policy, nonce=self._bytes("nonce"), iv=self._bytes("iv"))
        self._sessions[blob] = (policy, tek, tik)
        return blob

    def judge(self, dh: bytes, session: bytes, policy: int) -> object:
        """Keys (TEK, TIK) of a certificate and session that are right for `policy`, else the codes that are."""
        known = self._sessions.get(session)
        codes = set()
        if len(session) != c.SEV_SESSION_SIZE:
            codes |= {LENGTH}
        if dh != self.dh:
            codes |= {CERTIFICATE, LENGTH}
        if known is None or known[0] != policy:
            codes |= {BAD_MAC}
        return codes or (known[1:] if known else codes)

    def packet(self, keys: tuple[bytes, bytes], plain: bytes, measure: bytes) -> tuple[bytes, bytes]:
        """Header and ciphertext of a secret."""
        return crypto.seal_secret(*keys, plain, self._bytes("packet"), measure=measure)
