"""The SEV firmware (PSP) of one platform: its state, its guests, and which of them has which ASID.

It answers in firmware status codes (`FirmwareError`), never in errno: those are KVM's. What concerns one guest is in
guest.py, the platform's keys and certificates in identity.py, keys themselves in vault.py.

    platform: UNINIT -> INIT -> WORKING while it has guests      guest: see guest.py

A guest is *started* (LAUNCH_START, RECEIVE_START: it has a handle and keys), then *activated* (an ASID is its own); only
an active guest takes commands. Handles are never used again. Behaviour beyond what the kernel shows follows AMD's
published tools; what no hardware run has confirmed is listed in docs/fidelity.md.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from kvmapi.abi import psp, sev
from kvmapi.model.mem.cipher import PageCipher
from kvmapi.model.sev.guest import API_MAJOR, API_MINOR, BUILD, GuestContext
from kvmapi.model.sev.identity import Identity
from kvmapi.model.sev.status import FirmwareError
from kvmapi.model.sev.transport import Transport
from kvmapi.model.sev.vault import Vault

if TYPE_CHECKING:
    from kvmapi.model.sev.store import Store

__all__ = ("API_MAJOR", "API_MINOR", "BUILD", "Firmware", "FirmwareError", "GuestContext", "Identity")


class Firmware:
    """One platform. Thread-safe: guests of several VMs share it.

    ASIDs are 1..`asids`; those below `min_sev_asid` are for SEV-ES guests only, the others for SEV guests only. `store`
    is the platform's non-volatile memory, None for a platform that forgets everything with this object.
    """

    def __init__(self, asids: int, min_sev_asid: int = 1, store: Store | None = None) -> None:
        self._asids, self._min_sev_asid = asids, min_sev_asid
        self.lock = threading.RLock()
        """One command at a time; the driver holds it over several (sev_cmd_mutex)."""
        self._guests: dict[int, GuestContext] = {}
        self._owners: dict[int, int] = {}  # ASID -> handle
        self._next_handle = 1
        self._initialised = True  # KVM and its driver initialise the platform when they are loaded
        self.vault = Vault()
        self.identity = Identity(self.vault, store)  # draws and reads nothing until it is asked

    # ---- the platform
    @property
    def state(self) -> int:
        """SEV_PLATFORM_UNINIT, INIT or WORKING."""
        if not self._initialised:
            return psp.SEV_PLATFORM_UNINIT
        return psp.SEV_PLATFORM_WORKING if self._guests else psp.SEV_PLATFORM_INIT

    @property
    def guest_count(self) -> int:
        return len(self._guests)

    @property
    def es_enabled(self) -> bool:
        """Initialised for SEV-ES: there are ASIDs for it."""
        return self._initialised and self._min_sev_asid > 1

    def init(self) -> None:
        """INIT; nothing to do for a platform that is initialised."""
        with self.lock:
            self._initialised = True

    def shutdown(self) -> None:
        """SHUTDOWN: every guest and its keys are gone."""
        with self.lock:
            for guest in list(self._guests.values()):
                self.decommission(guest)
            self._initialised = False

    def _require(self, *states: int) -> None:
        if self.state not in states:
            raise FirmwareError(psp.SEV_RET_INVALID_PLATFORM_STATE)

    def factory_reset(self) -> None:
        """PLATFORM_RESET: forget the owner and draw new keys; only an uninitialised platform may."""
        with self.lock:
            self._require(psp.SEV_PLATFORM_UNINIT)
            self.identity.factory_reset()

    def pek_gen(self) -> None:
        """PEK_GEN: a new endorsement key, owned by the platform itself, and a new PDH; not while there are guests."""
        with self.lock:
            self._require(psp.SEV_PLATFORM_INIT)
            self.identity.pek_gen()

    def pek_csr(self) -> bytes:
        """PEK_CSR: the PEK's certificate without signatures, for an owner to sign."""
        with self.lock:
            self._require(psp.SEV_PLATFORM_INIT)
            return self.identity.csr()

    def pek_cert_import(self, pek: bytes, oca: bytes) -> None:
        """PEK_CERT_IMPORT: an owner takes the platform."""
        with self.lock:
            self._require(psp.SEV_PLATFORM_INIT)
            self.identity.import_pek(pek, oca)

    def pdh_gen(self) -> None:
        """PDH_GEN: a new Diffie-Hellman key; sessions made for the old one are worthless."""
        with self.lock:
            self._require(psp.SEV_PLATFORM_INIT, psp.SEV_PLATFORM_WORKING)
            self.identity.pdh_gen()

    def pdh_cert_export(self) -> tuple[bytes, bytes]:
        """PDH_CERT_EXPORT: the PDH's certificate, and PEK, OCA, CEK."""
        with self.lock:
            self._require(psp.SEV_PLATFORM_INIT, psp.SEV_PLATFORM_WORKING)
            return self.identity.export()

    def get_id(self) -> bytes:
        """GET_ID: 64 bytes, in every state."""
        return self.identity.chip_id

    # ---- guests
    def guest(self, handle: int) -> GuestContext:
        """The guest with this handle; INVALID_GUEST when there is none."""
        guest = self._guests.get(handle)
        if guest is None:
            raise FirmwareError(psp.SEV_RET_INVALID_GUEST)
        return guest

    def launch_start(self, policy: int, dh_cert: bytes, session: bytes, handle: int = 0) -> GuestContext:
        """LAUNCH_START: a new guest, with the owner's keys if a session came along, else with keys nobody knows.

        `handle`, if not 0, names a guest whose memory key the new one shares; both policies must allow it and be equal.
        """
        with self.lock:
            self._check_policy(policy)
            sibling = self.guest(handle) if handle else None
            if sibling is not None and (policy != sibling.policy or policy & sev.SEV_POLICY_NOKS):
                raise FirmwareError(psp.SEV_RET_POLICY_FAILURE)
            return self._start(policy, dh_cert, session, sev.SEV_STATE_LAUNCH_UPDATE, sibling)

    def receive_start(self, policy: int, pdh: bytes, session: bytes) -> GuestContext:
        """RECEIVE_START: a guest that arrives from the platform whose PDH certificate this is."""
        with self.lock:
            self._check_policy(policy)
            if not session:
                raise FirmwareError(psp.SEV_RET_INVALID_LEN)
            return self._start(policy, pdh, session, sev.SEV_STATE_RECEIVE_UPDATE, None)

    def _check_policy(self, policy: int) -> None:
        self._require(psp.SEV_PLATFORM_INIT, psp.SEV_PLATFORM_WORKING)
        minimum = (policy >> sev.SEV_POLICY_API_MAJOR_SHIFT & 0xFF, policy >> sev.SEV_POLICY_API_MINOR_SHIFT & 0xFF)
        if minimum > (API_MAJOR, API_MINOR) or (policy & sev.SEV_POLICY_ES and not self.es_enabled):
            raise FirmwareError(psp.SEV_RET_POLICY_FAILURE)

    def _start(self, policy: int, peer: bytes, session: bytes, state: int, sibling: GuestContext | None) -> GuestContext:
        transport = Transport(self.vault)
        try:
            if session:
                self._open_session(transport, peer, session, policy)
            else:
                transport.draw()
            cipher = PageCipher(self.vault) if sibling is None else sibling.cipher.shared()
        except BaseException:
            transport.forget()
            raise
        guest = GuestContext(self._next_handle, policy, state, self.vault, transport, cipher, self.identity)
        self._guests[guest.handle] = guest
        self._next_handle += 1
        return guest

    def _open_session(self, transport: Transport, peer: bytes, session: bytes, policy: int) -> None:
        z = self.identity.shared_secret(peer)
        try:
            transport.open_session(session, z, policy)
        finally:
            z[:] = os.urandom(len(z))

    def activate(self, guest: GuestContext, asid: int) -> None:
        """ACTIVATE: the guest gets this ASID. ACTIVE, INVALID_ASID (outside its kind's range) or ASID_OWNED."""
        with self.lock:
            if guest.asid is not None:
                raise FirmwareError(psp.SEV_RET_ACTIVE)
            for_es = 1 <= asid < self._min_sev_asid
            if not 1 <= asid <= self._asids or for_es != bool(guest.policy & sev.SEV_POLICY_ES):
                raise FirmwareError(psp.SEV_RET_INVALID_ASID)
            if asid in self._owners:
                raise FirmwareError(psp.SEV_RET_ASID_OWNED)
            self._owners[asid] = guest.handle
            guest.asid = asid

    def deactivate(self, guest: GuestContext) -> None:
        """DEACTIVATE: the ASID is nobody's; the guest keeps its keys and takes no commands. INACTIVE if it has none."""
        with self.lock:
            if guest.asid is None:
                raise FirmwareError(psp.SEV_RET_INACTIVE)
            del self._owners[guest.asid]
            guest.asid = None

    def decommission(self, guest: GuestContext) -> None:
        """DECOMMISSION: guest and keys are gone. One that is still active is deactivated first; safe to call twice."""
        with self.lock:
            if self._guests.pop(guest.handle, None) is None:
                return
            if guest.asid is not None:
                self.deactivate(guest)
            guest.forget()
