"""`OwnerSession`: the guest owner's side of a launch. Keys for one guest on one platform, wrapped for its firmware.

The owner holds TIK (proves the measurement) and TEK (hides secrets); the host carries only `dh_cert` and `session`.
Keys never appear in a repr.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from kvmapi import session_crypto as crypto
from kvmapi.abi import cert as c
from kvmapi.measurement import expected_measure, same


@dataclass(frozen=True, slots=True)
class OwnerSession:
    """`dh_cert` (2084 bytes) and `session` (128) go into LAUNCH_START; `tek` and `tik` stay with the owner.

    >>> owner = OwnerSession.create(pdh_cert, policy=0)           # doctest: +SKIP
    >>> started = Launch(vm, sev).start(0, owner.dh_cert, owner.session)       # doctest: +SKIP
    """

    policy: int
    dh_cert: bytes = field(repr=False)
    session: bytes = field(repr=False)
    tek: bytes = field(repr=False)
    tik: bytes = field(repr=False)

    @classmethod
    def create(cls, pdh_cert: bytes, policy: int) -> OwnerSession:
        """New keys for a guest with `policy` on the platform whose PDH certificate this is.

        The certificate's chain is not checked here; an owner who does not trust the host checks it first
        (`session_crypto.cert_signed_by`). Raises `session_crypto.SessionError` if the certificate is malformed.
        """
        private = crypto.new_key()
        z = crypto.shared_secret(private, crypto.cert_key(crypto.parse_cert(pdh_cert)))
        tek, tik = secrets.token_bytes(crypto.KEY_SIZE), secrets.token_bytes(crypto.KEY_SIZE)
        blob = crypto.wrap_session(z, tek, tik, policy, nonce=secrets.token_bytes(16), iv=secrets.token_bytes(16))
        certificate = crypto.make_cert(private.public_key(), c.SEV_USAGE_PDH, c.SEV_ALGO_ECDH_SHA256)
        return cls(policy, bytes(certificate), blob, tek, tik)

    def expected_measure(self, digest: bytes, nonce: bytes, *, api_major: int, api_minor: int, build: int) -> bytes:
        """What LAUNCH_MEASURE should return for this digest and the firmware's nonce."""
        return expected_measure(self.tik, digest, nonce, policy=self.policy, api_major=api_major, api_minor=api_minor, build=build)

    def verify(self, measure: bytes, digest: bytes, nonce: bytes, *, api_major: int, api_minor: int, build: int) -> bool:
        """Whether the firmware measured what the owner expects."""
        return same(measure, self.expected_measure(digest, nonce, api_major=api_major, api_minor=api_minor, build=build))

    def seal_secret(self, plaintext: bytes, measure: bytes | None) -> tuple[bytes, bytes]:
        """Header and ciphertext of a secret for a verified guest; `measure` is None before API 0.17."""
        return crypto.seal_secret(self.tek, self.tik, plaintext, secrets.token_bytes(16), measure=measure)
