"""Does a platform's chain of certificates hold together? Link by link, offline, with the words for each failure.

    PDH <- PEK, PEK <- OCA, OCA <- OCA, PEK <- CEK, CEK <- ASK, ASK <- ARK, ARK <- ARK

What a chain proves is that these keys belong to a chip of whoever owns the root. Whether the root is AMD's is for the
reader to compare with what AMD publishes: a key id can be copied, and this program carries nobody's root.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from kvmapi import certificates as certs
from kvmapi.abi import cert as c

MISSING, MALFORMED, SIGNATURE = "missing", "malformed", "signature"


@dataclass(frozen=True, slots=True)
class Link:
    """One signature of a chain. `fault` is "" when it holds, else "missing", "malformed" or "signature"; `words` says more."""

    certificate: str
    signer: str
    fault: str = ""
    words: str = ""

    @property
    def ok(self) -> bool:
        """The link holds."""
        return not self.fault

    def __str__(self) -> str:
        return f"{self.certificate} <- {self.signer}"


_Child = TypeVar("_Child", c.sev_cert, certs.AmdCertificate)
_Signer = TypeVar("_Signer", c.sev_cert, certs.AmdCertificate)


@dataclass(frozen=True, slots=True)
class Chain:
    """The certificates of a platform as they came: raw bytes, b"" for one that is not there."""

    pdh: bytes
    pek: bytes
    oca: bytes
    cek: bytes
    ask: bytes = b""
    ark: bytes = b""

    @classmethod
    def of(cls, pdh: bytes, platform: bytes, amd: bytes = b"") -> Chain:
        """From what PDH_CERT_EXPORT gives (`platform`: PEK, OCA, CEK) and, if it is there, ASK and ARK in one buffer.

        What cannot be taken apart is kept whole, so that a link names it as malformed.
        """
        size = c.SEV_CERT_SIZE
        parts = (pdh, platform[:size], platform[size : 2 * size], platform[2 * size :])
        try:
            ask, ark = certs.split_amd(amd)
        except certs.CertificateError:
            return cls(*parts, amd)
        return cls(*parts, bytes(ask), bytes(ark))

    def links(self) -> tuple[Link, ...]:
        """Every link: the owner's side first, then AMD's up to the root."""
        return (*self.platform_links(), *self.amd_links())

    def platform_links(self) -> tuple[Link, ...]:
        """The links up to OCA and CEK: what PDH_CERT_EXPORT alone can show."""
        pdh, pek, oca = (self._sev(name) for name in ("PDH", "PEK", "OCA"))
        signed = certs.cert_signed_by
        return (
            _link("PDH", "PEK", pdh, pek, signed),
            _link("PEK", "OCA", pek, oca, signed),
            _link("OCA", "OCA", oca, oca, signed),
            _link("PEK", "CEK", pek, self._sev("CEK"), signed),
        )

    def amd_links(self) -> tuple[Link, ...]:
        """The links from CEK to the root."""
        return tuple(self._amd_links())

    def _amd_links(self) -> Iterator[Link]:
        cek, ask, ark = self._sev("CEK"), self._amd("ASK"), self._amd("ARK")
        yield _link("CEK", "ASK", cek, ask, certs.cert_signed_by_ask)
        yield _link("ASK", "ARK", ask, ark, certs.AmdCertificate.signed_by)
        if isinstance(ark, certs.AmdCertificate) and not ark.signature and ark.certifying_id == ark.key_id:
            yield Link("ARK", "ARK", words="published without its own signature, which would prove nothing")
        else:
            yield _link("ARK", "ARK", ark, ark, certs.AmdCertificate.signed_by)

    @property
    def root(self) -> bytes:
        """The key id of the ARK (16 bytes), or b"" if there is none that can be read."""
        ark = self._amd("ARK")
        return b"" if isinstance(ark, Link) else ark.key_id

    def _sev(self, name: str) -> c.sev_cert | Link:
        data: bytes = getattr(self, name.lower())
        try:
            return certs.parse_cert(data, _USAGES[name]) if data else _missing(name)
        except certs.CertificateError as reason:
            return _malformed(name, reason)

    def _amd(self, name: str) -> certs.AmdCertificate | Link:
        data: bytes = getattr(self, name.lower())
        try:
            return certs.parse_amd(data, _USAGES[name]) if data else _missing(name)
        except certs.CertificateError as reason:
            return _malformed(name, reason)


_USAGES = {
    "PDH": c.SEV_USAGE_PDH, "PEK": c.SEV_USAGE_PEK, "OCA": c.SEV_USAGE_OCA, "CEK": c.SEV_USAGE_CEK,
    "ASK": c.SEV_USAGE_ASK, "ARK": c.SEV_USAGE_ARK,
}  # fmt: skip


def _missing(name: str) -> Link:
    return Link(name, "", MISSING, f"there is no {name} certificate")


def _malformed(name: str, reason: Exception) -> Link:
    return Link(name, "", MALFORMED, f"the {name} certificate is malformed: {reason}")


def _link(name: str, signer: str, child: _Child | Link, parent: _Signer | Link, signed: Callable[[_Child, _Signer], bool]) -> Link:
    if isinstance(child, Link):
        return Link(name, signer, child.fault, child.words)
    if isinstance(parent, Link):
        return Link(name, signer, parent.fault, parent.words)
    if signed(child, parent):
        return Link(name, signer)
    return Link(name, signer, SIGNATURE, f"the {name} certificate carries no valid signature of this {signer}")
