"""The attestation report of GET_ATTESTATION_REPORT: what a guest was launched from, signed by the platform it runs on.

    208 bytes: nonce (16) | launch digest (32) | policy | usage of the signing key | algorithm | reserved | r, s (72 each)

The PEK signs the first 52 bytes. A report proves something only together with the chain of that PEK
(`kvmapi.certificates`), with a nonce of one's own, and with the digest one expects; `verify` asks for all that can be
asked here and raises with the first thing that is wrong. Sources: AMD's SEV tool, virtee's sev crate (facts).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvmapi import certificates
from kvmapi.abi import cert as c
from kvmapi.errors import KvmApiError
from kvmapi.measurement import same

_SIGNED = c.sev_attestation_report.sig_usage.offset


class AttestationError(KvmApiError):
    """A report is malformed, not signed by the given PEK, or not about the expected guest."""


@dataclass(frozen=True, slots=True)
class AttestationReport:
    """One report, parsed and not yet believed.

    >>> report = AttestationReport.parse(running.attestation_report(nonce))            # doctest: +SKIP
    >>> report.verify(pek_certificate, nonce=nonce, digest=expected, policy=1)         # doctest: +SKIP
    """

    nonce: bytes
    digest: bytes
    policy: int
    usage: int
    algo: int
    signature: bytes = field(repr=False)
    signed: bytes = field(repr=False)

    @classmethod
    def parse(cls, data: bytes) -> AttestationReport:
        """From its 208 bytes. Raises `AttestationError`."""
        if len(data) != c.SEV_ATTESTATION_REPORT_SIZE:
            raise AttestationError(f"an attestation report has {c.SEV_ATTESTATION_REPORT_SIZE} bytes, not {len(data)}")
        raw = c.sev_attestation_report.from_buffer_copy(data)
        return cls(
            bytes(raw.mnonce), bytes(raw.launch_digest), raw.policy, raw.sig_usage, raw.sig_algo, bytes(raw.sig1), data[:_SIGNED]
        )  # fmt: skip

    def verify(self, pek: bytes, *, nonce: bytes, digest: bytes | None = None, policy: int | None = None) -> None:
        """Believe the report: signed by the PEK of this certificate (2084 bytes), fresh, and about this digest and policy.

        `digest` and `policy` None are not compared. The certificate's own chain is not checked here. Raises `AttestationError`.
        """
        if self.usage != c.SEV_USAGE_PEK or self.algo not in certificates.ECDSA_ALGOS:
            signer = certificates.usage_name(self.usage)
            raise AttestationError(f"the report says it is signed by {signer} with algorithm {self.algo:#x}, not by a PEK with ECDSA")
        try:
            key = certificates.cert_key(certificates.parse_cert(pek, c.SEV_USAGE_PEK))
        except ValueError as wrong:
            raise AttestationError(f"the PEK certificate cannot be used: {wrong}") from None
        if not certificates.verify(key, self.signed, self.signature, self.algo):
            raise AttestationError("the report's signature is not by this PEK: another platform, a new PEK since, or a changed report")
        if not same(self.nonce, nonce):
            raise AttestationError(f"the report answers nonce {self.nonce.hex()}, not {nonce.hex()}: an old report, or another's")
        if digest is not None and not same(self.digest, digest):
            raise AttestationError(f"the guest was launched from digest {self.digest.hex()}, not {digest.hex()}")
        if policy is not None and self.policy != policy:
            raise AttestationError(f"the guest was launched with policy {self.policy:#x}, not {policy:#x}")
