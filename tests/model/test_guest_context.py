"""The firmware's commands for one guest, without KVM in front: states, transport, reports, and what fails changes nothing."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable
from typing import Any

import pytest

from kvmapi import session_crypto as crypto
from kvmapi.abi import cert, psp, sev
from kvmapi.model.sev.firmware import API_MAJOR, API_MINOR, BUILD, Firmware
from kvmapi.model.sev.guest import MEASURE_SIZE, GuestContext
from kvmapi.model.sev.status import FirmwareError
from kvmapi.session import OwnerSession

BASE = 0x7F0000000000
TEXT = bytes(range(256)) * 16


def status(call: Callable[..., Any], *arguments: Any) -> int:
    """The firmware's status of a call that must fail."""
    with pytest.raises(FirmwareError) as failure:
        call(*arguments)
    return failure.value.status


def started(firmware: Firmware, policy: int = 0, asid: int = 5, owner: OwnerSession | None = None) -> GuestContext:
    guest = firmware.launch_start(policy, owner.dh_cert if owner else b"", owner.session if owner else b"")
    firmware.activate(guest, asid)
    return guest


def running(firmware: Firmware, policy: int = 0, asid: int = 5) -> GuestContext:
    guest = started(firmware, policy, asid)
    guest.measure()
    guest.finish()
    return guest


@pytest.fixture
def firmware() -> Firmware:
    return Firmware(15, 5)


def owner_of(firmware: Firmware, policy: int = 0) -> OwnerSession:
    return OwnerSession.create(firmware.identity.pdh_certificate, policy)


ORDER = {
    "update": (sev.SEV_STATE_LAUNCH_UPDATE,),
    "measure": (sev.SEV_STATE_LAUNCH_UPDATE,),
    "secret": (sev.SEV_STATE_LAUNCH_SECRET,),
    "finish": (sev.SEV_STATE_LAUNCH_SECRET,),
    "send_data": (sev.SEV_STATE_SEND_UPDATE,),
    "send_finish": (sev.SEV_STATE_SEND_UPDATE,),
    "send_cancel": (sev.SEV_STATE_SEND_UPDATE,),
    "receive_data": (sev.SEV_STATE_RECEIVE_UPDATE,),
    "receive_finish": (sev.SEV_STATE_RECEIVE_UPDATE,),
    "send_start": (sev.SEV_STATE_RUNNING,),
    "report": (sev.SEV_STATE_LAUNCH_SECRET, sev.SEV_STATE_RUNNING, sev.SEV_STATE_SEND_UPDATE),
}


def calls(guest: GuestContext) -> dict[str, Callable[[], Any]]:
    return {
        "update": lambda: guest.update_data(BASE, TEXT),
        "measure": guest.measure,
        "secret": lambda: guest.launch_secret(BASE, bytes(52), bytes(16), 16),
        "finish": guest.finish,
        "send_data": lambda: guest.send_update_data(BASE, TEXT),
        "send_finish": guest.send_finish,
        "send_cancel": guest.send_cancel,
        "receive_data": lambda: guest.receive_update_data(BASE, bytes(52), bytes(16), 16),
        "receive_finish": guest.receive_finish,
        "send_start": lambda: guest.send_start(b"", b"", b""),
        "report": lambda: guest.attestation_report(bytes(16)),
    }


@pytest.mark.parametrize("state", range(7))
@pytest.mark.parametrize("name", ORDER)
def test_every_command_in_every_state(firmware: Firmware, name: str, state: int) -> None:
    guest = started(firmware)
    guest.state = state
    if state in ORDER[name]:
        try:
            calls(guest)[name]()
        except FirmwareError as failure:
            assert failure.status not in (psp.SEV_RET_INVALID_GUEST_STATE, psp.SEV_RET_INACTIVE)
            assert guest.state == state
        return
    assert status(calls(guest)[name]) == psp.SEV_RET_INVALID_GUEST_STATE
    assert guest.state == state
    firmware.deactivate(guest)
    assert status(calls(guest)[name]) == psp.SEV_RET_INACTIVE


def test_measure_is_the_owners(firmware: Firmware) -> None:
    owner = owner_of(firmware, 1)
    guest = started(firmware, 1, owner=owner)
    ciphertext = guest.update_data(BASE, TEXT)
    assert ciphertext != TEXT and guest.cipher.decrypt(BASE, ciphertext) == TEXT
    blob = guest.measure()
    assert len(blob) == MEASURE_SIZE
    version = {"api_major": API_MAJOR, "api_minor": API_MINOR, "build": BUILD}
    assert owner.expected_measure(hashlib.sha256(TEXT).digest(), blob[32:], **version) == blob[:32]


def test_a_vmsa_needs_an_es_policy(firmware: Firmware) -> None:
    guest = started(firmware)
    assert status(guest.update_vmsa, bytes(4096)) == psp.SEV_RET_INVALID_GUEST
    guest = started(firmware, sev.SEV_POLICY_ES, asid=1)
    assert status(guest.update_vmsa, bytes(4095)) == psp.SEV_RET_INVALID_LEN
    guest.update_vmsa(TEXT)
    guest.measure()
    assert guest.attestation_report(bytes(16))[16:48] == hashlib.sha256(TEXT).digest()


def test_alignment(firmware: Firmware) -> None:
    guest = started(firmware)
    assert status(guest.update_data, BASE + 8, TEXT) == psp.SEV_RET_INVALID_ADDRESS
    assert status(guest.update_data, BASE, TEXT[:17]) == psp.SEV_RET_INVALID_LEN
    assert status(guest.update_data, BASE, b"") == psp.SEV_RET_INVALID_LEN
    assert status(guest.dbg_decrypt, BASE + 1, TEXT[:16]) == psp.SEV_RET_INVALID_ADDRESS


def test_secret_packets(firmware: Firmware) -> None:
    owner = owner_of(firmware)
    guest = started(firmware, owner=owner)
    measure = guest.measure()[:32]
    keys = (owner.tek, owner.tik)
    header, trans = crypto.seal_secret(*keys, TEXT[:64], os.urandom(16), measure=measure)
    place = BASE + 0x1F0
    assert guest.cipher.decrypt(place, guest.launch_secret(place, header, trans, 64)) == TEXT[:64]
    wrong = [
        (psp.SEV_RET_BAD_MEASUREMENT, place, header[:-1] + bytes((header[-1] ^ 1,)), trans, 64),
        (psp.SEV_RET_BAD_MEASUREMENT, place, header, trans[:-1] + bytes((trans[-1] ^ 1,)), 64),
        (psp.SEV_RET_BAD_MEASUREMENT, place, b"\1" + header[1:], trans, 64),
        (psp.SEV_RET_BAD_MEASUREMENT, place, header, trans[:48], 48),
        (psp.SEV_RET_INVALID_LEN, place, header, trans, 48),
        (psp.SEV_RET_INVALID_LEN, place, header[:-1], trans, 64),
        (psp.SEV_RET_INVALID_LEN, BASE + 4096 - 16, header, trans, 64),
        (psp.SEV_RET_INVALID_ADDRESS, place + 1, header, trans, 64),
        (psp.SEV_RET_INVALID_LEN, place, header, b"", 0),
    ]
    for code, *arguments in wrong:
        assert status(guest.launch_secret, *arguments) == code, arguments[1:]
    for flags, code in ((cert.SEV_SECRET_FLAG_COMPRESSED, psp.SEV_RET_UNSUPPORTED), (2, psp.SEV_RET_INVALID_PARAM)):
        head, text = crypto.seal_secret(*keys, TEXT[:16], os.urandom(16), measure=measure, flags=flags)
        assert status(guest.launch_secret, place, head, text, 16) == code
    for other in (bytes(32), None):  # for another measurement, or for old firmware
        head, text = crypto.seal_secret(*keys, TEXT[:16], os.urandom(16), measure=other)
        assert status(guest.launch_secret, place, head, text, 16) == psp.SEV_RET_BAD_MEASUREMENT
    assert guest.state == sev.SEV_STATE_LAUNCH_SECRET


def test_sessions_that_are_wrong(firmware: Firmware) -> None:
    owner = owner_of(firmware, 1)
    other = OwnerSession.create(Firmware(15, 5).identity.pdh_certificate, 1)

    def start(policy: int, dh: bytes, session: bytes) -> int:
        return status(firmware.launch_start, policy, dh, session)

    assert start(0, owner.dh_cert, owner.session) == psp.SEV_RET_BAD_MEASUREMENT  # made for policy 1
    assert start(1, other.dh_cert, owner.session) == psp.SEV_RET_BAD_MEASUREMENT
    assert start(1, other.dh_cert, other.session) == psp.SEV_RET_BAD_MEASUREMENT  # made for another platform
    assert start(1, owner.dh_cert, owner.session[:-1]) == psp.SEV_RET_INVALID_LEN
    assert start(1, owner.dh_cert[:-1], owner.session) == psp.SEV_RET_INVALID_CERTIFICATE
    assert start(1, b"", owner.session) == psp.SEV_RET_INVALID_CERTIFICATE
    for at in range(0, 128, 7):
        bad = bytearray(owner.session)
        bad[at] ^= 0x10
        assert start(1, owner.dh_cert, bytes(bad)) == psp.SEV_RET_BAD_MEASUREMENT, at
    assert firmware.guest_count == 0 and firmware.state == psp.SEV_PLATFORM_INIT
    assert firmware.launch_start(1, owner.dh_cert, owner.session).handle == 1


def test_policies(firmware: Firmware) -> None:
    too_new = API_MAJOR << 16 | (API_MINOR + 1) << 24
    assert status(firmware.launch_start, too_new, b"", b"") == psp.SEV_RET_POLICY_FAILURE
    assert status(Firmware(15, 1).launch_start, sev.SEV_POLICY_ES, b"", b"") == psp.SEV_RET_POLICY_FAILURE
    assert firmware.launch_start(API_MINOR << 24, b"", b"").policy == API_MINOR << 24


def test_asids(firmware: Firmware) -> None:
    guest, es = firmware.launch_start(0, b"", b""), firmware.launch_start(sev.SEV_POLICY_ES, b"", b"")
    for asid in (0, 16, 4):
        assert status(firmware.activate, guest, asid) == psp.SEV_RET_INVALID_ASID
    assert status(firmware.activate, es, 5) == psp.SEV_RET_INVALID_ASID
    firmware.activate(guest, 5)
    assert status(firmware.activate, guest, 6) == psp.SEV_RET_ACTIVE
    assert status(firmware.activate, firmware.launch_start(0, b"", b""), 5) == psp.SEV_RET_ASID_OWNED
    firmware.decommission(guest)
    firmware.decommission(guest)
    assert status(firmware.guest, guest.handle) == psp.SEV_RET_INVALID_GUEST
    assert status(guest.measure) == psp.SEV_RET_INACTIVE
    firmware.activate(firmware.launch_start(0, b"", b""), 5)


def test_a_key_can_be_shared_where_policies_allow(firmware: Firmware) -> None:
    first = started(firmware)
    second = firmware.launch_start(0, b"", b"", first.handle)
    text = first.cipher.encrypt(BASE, TEXT)
    firmware.decommission(first)
    assert second.cipher.decrypt(BASE, text) == TEXT
    assert status(firmware.launch_start, 1, b"", b"", second.handle) == psp.SEV_RET_POLICY_FAILURE
    alone = firmware.launch_start(sev.SEV_POLICY_NOKS, b"", b"")
    assert status(firmware.launch_start, sev.SEV_POLICY_NOKS, b"", b"", alone.handle) == psp.SEV_RET_POLICY_FAILURE
    assert status(firmware.launch_start, 0, b"", b"", 99) == psp.SEV_RET_INVALID_GUEST


def test_debugging_follows_the_policy(firmware: Firmware) -> None:
    open_, closed = running(firmware), running(firmware, sev.SEV_POLICY_NODBG, 6)
    text = open_.dbg_encrypt(BASE, TEXT)
    assert text != TEXT and open_.dbg_decrypt(BASE, text) == TEXT
    for call in (closed.dbg_decrypt, closed.dbg_encrypt):
        assert status(call, BASE, TEXT) == psp.SEV_RET_POLICY_FAILURE


def test_a_guest_moves_between_platforms(firmware: Firmware) -> None:
    there = Firmware(15, 5)
    source = running(firmware, 1)
    memory = source.cipher.encrypt(BASE, TEXT)
    certificates = there.identity.pdh_certificate, there.identity.chain, there.identity.amd_certificates
    session = source.send_start(*certificates)
    assert source.state == sev.SEV_STATE_SEND_UPDATE
    destination = there.receive_start(1, firmware.identity.pdh_certificate, session)
    there.activate(destination, 5)
    header, trans = source.send_update_data(BASE, memory)
    assert TEXT[:32] not in trans
    place = BASE + 0x5000
    assert status(destination.receive_update_data, place, header, trans[:-16], 4080) == psp.SEV_RET_BAD_MEASUREMENT
    assert status(destination.receive_update_data, place, bytes(52), trans, 4096) == psp.SEV_RET_BAD_MEASUREMENT
    arrived = destination.receive_update_data(place, header, trans, 4096)
    assert destination.cipher.decrypt(place, arrived) == TEXT
    source.send_finish()
    destination.receive_finish()
    assert (source.state, destination.state) == (sev.SEV_STATE_SENT, sev.SEV_STATE_RUNNING)
    assert status(source.dbg_decrypt, BASE, memory) == psp.SEV_RET_POLICY_FAILURE


def test_a_cancelled_send_is_worthless(firmware: Firmware) -> None:
    there = Firmware(15, 5)
    source = running(firmware)
    peer = there.identity.pdh_certificate, there.identity.chain, there.identity.amd_certificates
    session = source.send_start(*peer)
    source.send_cancel()
    assert source.state == sev.SEV_STATE_RUNNING
    source.send_start(*peer)
    header, trans = source.send_update_data(BASE, bytes(4096))
    destination = there.receive_start(0, firmware.identity.pdh_certificate, session)
    there.activate(destination, 5)
    assert status(destination.receive_update_data, BASE, header, trans, 4096) == psp.SEV_RET_BAD_MEASUREMENT


def test_nosend_stays(firmware: Firmware) -> None:
    there = Firmware(15, 5).identity
    guest = running(firmware, sev.SEV_POLICY_NOSEND)
    assert status(guest.send_start, there.pdh_certificate, there.chain, there.amd_certificates) == psp.SEV_RET_POLICY_FAILURE
    assert guest.state == sev.SEV_STATE_RUNNING


def test_the_send_packet_is_as_described(firmware: Firmware) -> None:
    """An independent reading of the packet: the session opened by the owner's side of the code, MAC and CTR by hand."""
    from kvmapi import certificates

    key = certificates.new_key()
    pdh = bytes(certificates.make_cert(key.public_key(), cert.SEV_USAGE_PDH, cert.SEV_ALGO_ECDH_SHA256, API_MAJOR, API_MINOR))
    guest = running(firmware)
    guest._GuestContext__identity = Unchecked(firmware)  # type: ignore[attr-defined]
    session = guest.send_start(pdh, b"", b"")
    z = certificates.shared_secret(key, certificates.cert_key(certificates.parse_cert(firmware.identity.pdh_certificate)))
    tek, tik = crypto.unwrap_session(session, bytes(z), 0)
    header, trans = guest.send_update_data(BASE, guest.cipher.encrypt(BASE, TEXT))
    size = len(TEXT).to_bytes(4, "little")
    assert hmac.digest(tik, b"\2" + header[:20] + size + size + trans, "sha256") == header[20:]
    assert crypto.aes_ctr(tek, header[4:20], trans) == TEXT


class Unchecked:
    """An identity that takes any destination."""

    def __init__(self, firmware: Firmware) -> None:
        self.shared_secret = firmware.identity.shared_secret

    def validate_peer(self, *_: object) -> None:
        """Nothing is checked here: the packets are what is tested."""
