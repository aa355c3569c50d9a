"""Test support: a platform owner, who signs a platform's request with an OCA key of their own."""

from __future__ import annotations

from kvmapi import certificates as certs
from kvmapi.abi import cert as c


class Owner:
    """`oca` is the self-signed certificate (2084 bytes)."""

    def __init__(self) -> None:
        self.key = certs.new_key()
        made = certs.make_cert(self.key.public_key(), c.SEV_USAGE_OCA, c.SEV_ALGO_ECDSA_SHA256)
        certs.sign_cert(made, self.key, c.SEV_USAGE_OCA)
        self.oca = bytes(made)

    def sign(self, csr: bytes) -> bytes:
        """The PEK's certificate for a platform's request."""
        made = certs.parse_cert(csr)
        certs.sign_cert(made, self.key, c.SEV_USAGE_OCA)
        return bytes(made)
