"""Who the platform is: its keys and certificates, and what the firmware does with them.

    PDH <- PEK <- OCA (self-signed while the platform owns itself, else the owner's)
              \\- CEK <- ASK <- ARK (the model's own root: its key id reads "SEVMM MODEL ROOT")

The chip (its id and its CEK) never changes; PDH_GEN, PEK_GEN, PEK_CERT_IMPORT and FACTORY_RESET replace the rest as a
whole: a new state is made beside the old one, saved if there is a store, and only then takes its place. When anything
fails, nothing has happened. Private keys stay in the vault (keys.py), and what leaves is signatures.

With a store, other processes may change the platform: every command looks first whether the file is still the one that
was read, and whoever changes it holds its lock. A file that goes bad meanwhile is the firmware's SECURE_DATA_INVALID, one
that cannot be written HWSEV_RET_PLATFORM; a file that goes away is written again by the next change.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvmapi import cert_chain
from kvmapi import certificates as certs
from kvmapi.abi import cert as c
from kvmapi.abi import psp, sev
from kvmapi.model.sev.guest import API_MAJOR, API_MINOR
from kvmapi.model.sev.keys import ID_SIZE, KeyState, Root, draw, in_use
from kvmapi.model.sev.status import FirmwareError
from kvmapi.model.sev.store import StoreError
from kvmapi.wiping import wipe

if TYPE_CHECKING:
    from kvmapi.model.sev.store import Store
    from kvmapi.model.sev.vault import Vault

_ALGOS = {c.SEV_USAGE_PDH: c.SEV_ALGO_ECDH_SHA256}
_FAULTS = {
    cert_chain.SIGNATURE: psp.SEV_RET_BAD_SIGNATURE,
    cert_chain.MALFORMED: psp.SEV_RET_INVALID_CERTIFICATE,
    cert_chain.MISSING: psp.SEV_RET_INVALID_CERTIFICATE,
}


class Identity:
    """The platform's identity: taken from `store`, or drawn (and kept there, if there is one). Thread-safe.

    Nothing is drawn or read before the first method that needs it: a launch without session needs no identity. Every
    method may raise `FirmwareError` for the store's sake; the other statuses are in the methods' texts.
    """

    def __init__(self, vault: Vault, store: Store | None = None) -> None:
        self.__vault = vault
        self._store = store
        self._stamp: tuple[int, int, int] | None = None
        self._lock = threading.RLock()
        self.__state: KeyState | None = None

    def __repr__(self) -> str:
        return "Identity(keys never shown)"

    def __reduce__(self) -> str:
        raise TypeError("a platform's identity never leaves the model's firmware")

    # ---- what everybody may know
    @property
    def chip_id(self) -> bytes:
        """GET_ID: 64 bytes, the same for the life of the platform."""
        return self._current().chip_id

    @property
    def owned(self) -> bool:
        """The OCA is somebody else's. A platform that was never asked for a key is not drawn for this question."""
        with self._lock:
            self._look()
            return self.__state is not None and "OCA" not in self.__state.keys

    @property
    def pdh_certificate(self) -> bytes:
        """2084 bytes."""
        return self.export()[0]

    @property
    def chain(self) -> bytes:
        """PEK, OCA, CEK: 3 times 2084 bytes. Unlike a chip's, the CEK comes with its ASK signature: no key server has the model's."""
        return self.export()[1]

    def export(self) -> tuple[bytes, bytes]:
        """PDH_CERT_EXPORT: `pdh_certificate` and `chain` of one moment."""
        of = self._current().certificates
        return of["PDH"], of["PEK"] + of["OCA"] + of["CEK"]

    @property
    def amd_certificates(self) -> bytes:
        """ASK, ARK: what AMD publishes for its chips; here they are the model's own."""
        of = self._current().certificates
        return of["ASK"] + of["ARK"]

    def csr(self) -> bytes:
        """PEK_CSR: the PEK's certificate (2084 bytes) without signatures, for an owner to sign."""
        return bytes(certs.unsigned(certs.parse_cert(self._current().certificates["PEK"])))

    # ---- what needs a private key
    def shared_secret(self, dh_certificate: bytes) -> bytearray:
        """Z (48 bytes) of another party's Diffie-Hellman certificate and our PDH; the caller wipes it.

        INVALID_CERTIFICATE for a certificate that is none. Nobody looks at its signature: an owner has no PEK to sign with.
        """
        try:
            peer = certs.cert_key(certs.parse_cert(dh_certificate, c.SEV_USAGE_PDH))
        except certs.CertificateError:
            raise FirmwareError(psp.SEV_RET_INVALID_CERTIFICATE) from None
        with self._lock, in_use(self.__vault, self._current().keys["PDH"]) as private:
            transient = certs.shared_secret(private, peer)
        z = bytearray(transient)
        wipe(transient)
        return z

    def sign_with_pek(self, data: bytes) -> bytes:
        """ECDSA with SHA-256 by the PEK: r and s, 72 bytes each, little-endian (144 bytes)."""
        with self._lock, in_use(self.__vault, self._current().keys["PEK"]) as private:
            return certs.sign(private, data)

    def validate_peer(self, plat_certs: bytes, amd_certs: bytes, pdh: bytes, policy: int) -> None:
        """SEND_START: may a guest with `policy` go to the platform with these certificates?

        INVALID_CERTIFICATE, BAD_SIGNATURE: the chain does not hold; with the policy's SEV bit it must end in our own root
        (INVALID_CERTIFICATE). POLICY_FAILURE: DOMAIN and another OCA, or an API version below the policy's.
        """
        if len(plat_certs) != 3 * c.SEV_CERT_SIZE:
            raise FirmwareError(psp.SEV_RET_INVALID_CERTIFICATE)
        chain = cert_chain.Chain.of(pdh, plat_certs, amd_certs)
        for link in chain.links() if policy & sev.SEV_POLICY_SEV else chain.platform_links():
            if link.fault:
                raise FirmwareError(_FAULTS[link.fault])
        ours = self._current().certificates
        if policy & sev.SEV_POLICY_SEV and chain.ark != ours["ARK"]:
            raise FirmwareError(psp.SEV_RET_INVALID_CERTIFICATE)
        if policy & sev.SEV_POLICY_DOMAIN and not _same_key(chain.oca, ours["OCA"]):
            raise FirmwareError(psp.SEV_RET_POLICY_FAILURE)
        theirs = certs.parse_cert(pdh)
        minimum = (policy >> sev.SEV_POLICY_API_MAJOR_SHIFT & 0xFF, policy >> sev.SEV_POLICY_API_MINOR_SHIFT & 0xFF)
        if (theirs.api_major, theirs.api_minor) < minimum:
            raise FirmwareError(psp.SEV_RET_POLICY_FAILURE)

    # ---- what changes the platform
    def pdh_gen(self) -> None:
        """PDH_GEN: a new Diffie-Hellman key; sessions made for the old one are worthless."""
        with self._change() as draft:
            self._draw_pdh(draft)

    def pek_gen(self) -> None:
        """PEK_GEN: a new PEK and PDH; a platform that had an owner owns itself again, with a new OCA."""
        with self._change() as draft:
            if "OCA" not in draft.keys:
                self._draw_oca(draft)
            self._draw_pek(draft)

    def factory_reset(self) -> None:
        """FACTORY_RESET: new OCA, PEK and PDH; the chip stays who it is."""
        with self._change() as draft:
            self._draw_oca(draft)
            self._draw_pek(draft)

    def import_pek(self, pek: bytes, oca: bytes) -> None:
        """PEK_CERT_IMPORT: `pek` is our CSR signed by the owner, `oca` the owner's self-signed certificate.

        ALREADY_OWNED; INVALID_CERTIFICATE when one is malformed or the PEK is not ours; BAD_SIGNATURE.
        """
        with self._change() as draft:
            if "OCA" not in draft.keys:
                raise FirmwareError(psp.SEV_RET_ALREADY_OWNED)
            try:
                ours = certs.parse_cert(draft.certificates["PEK"])
                signed, owner = certs.parse_cert(pek, c.SEV_USAGE_PEK), certs.parse_cert(oca, c.SEV_USAGE_OCA)
            except certs.CertificateError:
                raise FirmwareError(psp.SEV_RET_INVALID_CERTIFICATE) from None
            if certs.body(signed) != certs.body(ours):
                raise FirmwareError(psp.SEV_RET_INVALID_CERTIFICATE)
            by_owner = certs.signature_by(signed, owner)
            if by_owner is None or not certs.cert_signed_by(owner, owner):
                raise FirmwareError(psp.SEV_RET_BAD_SIGNATURE)
            certificate = certs.unsigned(ours)  # the owner's signature first, then the chip's; nothing else of what came is kept
            certificate.sig1 = by_owner
            self._sign(draft, certificate, c.SEV_USAGE_CEK)
            draft.certificates.update(PEK=bytes(certificate), OCA=bytes(oca))
            del draft.keys["OCA"]

    # ---- making keys
    def _draw(self, draft: KeyState, usage: int) -> c.sev_cert:
        """A new key in the vault; its certificate, unsigned."""
        name, algo = certs.usage_name(usage), _ALGOS.get(usage, c.SEV_ALGO_ECDSA_SHA256)
        draft.keys[name] = draw(self.__vault)
        with in_use(self.__vault, draft.keys[name]) as private:
            return certs.make_cert(private.public_key(), usage, algo, API_MAJOR, API_MINOR)

    def _sign(self, draft: KeyState, certificate: c.sev_cert, usage: int) -> None:
        with in_use(self.__vault, draft.keys[certs.usage_name(usage)]) as private:
            certs.sign_cert(certificate, private, usage)

    def _draw_pdh(self, draft: KeyState) -> None:
        certificate = self._draw(draft, c.SEV_USAGE_PDH)
        self._sign(draft, certificate, c.SEV_USAGE_PEK)
        draft.certificates["PDH"] = bytes(certificate)

    def _draw_pek(self, draft: KeyState) -> None:
        certificate = self._draw(draft, c.SEV_USAGE_PEK)
        self._sign(draft, certificate, c.SEV_USAGE_OCA)
        self._sign(draft, certificate, c.SEV_USAGE_CEK)
        draft.certificates["PEK"] = bytes(certificate)
        self._draw_pdh(draft)

    def _draw_oca(self, draft: KeyState) -> None:
        certificate = self._draw(draft, c.SEV_USAGE_OCA)
        self._sign(draft, certificate, c.SEV_USAGE_OCA)
        draft.certificates["OCA"] = bytes(certificate)

    def _new_chip(self) -> KeyState:
        """A platform as it leaves the factory."""
        draft, root = KeyState(os.urandom(ID_SIZE), {}, {}), Root.of_this_process()
        try:
            certificate = self._draw(draft, c.SEV_USAGE_CEK)
            root.sign(certificate)
            draft.certificates.update(CEK=bytes(certificate), ASK=root.ask, ARK=root.ark)
            self._draw_oca(draft)
            self._draw_pek(draft)
        except BaseException:
            draft.release()
            raise
        return draft

    # ---- keeping them
    def _current(self) -> KeyState:
        with self._lock:
            self._look()
            state = self.__state
            if state is None:
                with self._exclusive():
                    state = self.__state or self._make()  # another process may have been faster
            return state

    def _make(self) -> KeyState:
        new = self._new_chip()
        try:
            self._adopt(new)
        except BaseException:
            new.release()
            raise
        return new

    def _look(self) -> None:
        """Take what stands in the store, if it is not what we know."""
        if self._store is None or (stamp := self._store.stamp()) is None or stamp == self._stamp:
            return
        try:
            record = self._store.load()
            if record is None:
                return
            with record:
                new = KeyState.of(record, self.__vault)
        except (StoreError, ValueError):
            raise FirmwareError(psp.SEV_RET_SECURE_DATA_INVALID) from None
        old, self.__state, self._stamp = self.__state, new, stamp
        if old is not None:
            old.release()

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Nobody else changes the store, and what we know is what stands there."""
        with contextlib.ExitStack() as stack:
            if self._store is not None:
                try:
                    stack.enter_context(self._store.locked())
                except StoreError:
                    raise FirmwareError(psp.SEV_RET_HWSEV_RET_PLATFORM) from None
                self._look()
            yield

    @contextlib.contextmanager
    def _change(self) -> Iterator[KeyState]:
        """A copy to change; it becomes the state when the context ends well."""
        with self._lock:
            self._current()
            with self._exclusive():
                old = self._current()
                draft = old.copy()
                try:
                    yield draft
                    self._adopt(draft)
                except BaseException:
                    draft.release(but=old)
                    raise

    def _adopt(self, new: KeyState) -> None:
        """Save a state and make it the current one."""
        if self._store is not None:
            try:
                with self.__vault.opened():
                    self._store.save(new.parts())
            except StoreError:
                raise FirmwareError(psp.SEV_RET_HWSEV_RET_PLATFORM) from None
            self._stamp = self._store.stamp()
        old, self.__state = self.__state, new
        if old is not None:
            old.release(but=new)


def _same_key(one: bytes, other: bytes) -> bool:
    """Do two certificates certify the same key?"""
    return certs.cert_key(certs.parse_cert(one)).public_numbers() == certs.cert_key(certs.parse_cert(other)).public_numbers()
