"""A launch with a guest owner, /dev/sev, and what the owner finds out."""

from __future__ import annotations

import ctypes
import os
from errno import EFAULT, EINVAL, EIO
from typing import Any

import pytest

from kvmapi.abi import cert, psp, sev
from kvmapi.certificates import cert_signed_by, parse_cert
from kvmapi.errors import KvmError
from kvmapi.launch import guest_status
from kvmapi.session import OwnerSession
from kvmapi.sev import SevPlatform
from tests.model.sev_guest import SevGuest

pytestmark = pytest.mark.model


def owned(host: Any, policy: int = 0) -> OwnerSession:
    with SevPlatform(host) as platform:
        return OwnerSession.create(platform.pdh_cert_export()[0], policy)


def versions(guest: SevGuest) -> dict[str, int]:
    status = guest.platform.status()
    return {"api_major": status.api_major, "api_minor": status.api_minor, "build": status.build}


def test_the_owner_verifies_the_measurement(model_host: Any) -> None:
    owner = owned(model_host, sev.SEV_POLICY_NODBG)
    with SevGuest(model_host, policy=sev.SEV_POLICY_NODBG, dh_cert=owner.dh_cert, session=owner.session) as guest:
        measured, version = guest.measured, versions(guest)
        assert measured.measure == owner.expected_measure(guest.digest, measured.nonce, **version)
        assert owner.verify(measured.measure, guest.digest, measured.nonce, **version)
        assert not owner.verify(measured.measure, bytes(32), measured.nonce, **version)
        assert not owner.verify(measured.measure, guest.digest, bytes(16), **version)


def test_without_a_session_nobody_can_verify(model_host: Any) -> None:
    owner = owned(model_host)
    with SevGuest(model_host) as guest:
        assert not owner.verify(guest.measured.measure, guest.digest, guest.measured.nonce, **versions(guest))


def test_one_changed_byte_changes_the_measurement(model_host: Any) -> None:
    owner = owned(model_host)
    with SevGuest(model_host, b"\xf4", dh_cert=owner.dh_cert, session=owner.session) as good:
        expected = good.digest
    with SevGuest(model_host, b"\x90", dh_cert=owner.dh_cert, session=owner.session) as evil:
        assert not owner.verify(evil.measured.measure, expected, evil.measured.nonce, **versions(evil))


@pytest.mark.parametrize("at", [0, 16, 48, 64, 96, 127])
def test_a_tampered_session(model_host: Any, at: int) -> None:
    owner = owned(model_host)
    bad = bytearray(owner.session)
    bad[at] ^= 1
    with pytest.raises(KvmError) as caught:
        SevGuest(model_host, dh_cert=owner.dh_cert, session=bytes(bad))
    assert (caught.value.errno, caught.value.fw_error) == (EIO, psp.SEV_RET_BAD_MEASUREMENT)


def test_a_session_for_another_policy_or_platform(model_host: Any) -> None:
    owner = owned(model_host, 1)
    with pytest.raises(KvmError) as caught:
        SevGuest(model_host, policy=0, dh_cert=owner.dh_cert, session=owner.session)
    assert caught.value.fw_error == psp.SEV_RET_BAD_MEASUREMENT
    from kvmapi.model.host import ModelHost

    stranger = owned(ModelHost())
    with pytest.raises(KvmError) as caught:
        SevGuest(model_host, dh_cert=stranger.dh_cert, session=stranger.session)
    assert caught.value.fw_error == psp.SEV_RET_BAD_MEASUREMENT


@pytest.mark.parametrize(("dh", "session", "expected"), [
    (bytes(2084), None, psp.SEV_RET_INVALID_CERTIFICATE), (b"short", None, psp.SEV_RET_INVALID_CERTIFICATE),
    (None, bytes(127), psp.SEV_RET_INVALID_LEN), (None, bytes(0x4000), psp.SEV_RET_INVALID_LEN),
])  # fmt: skip
def test_malformed_blobs(model_host: Any, dh: bytes | None, session: bytes | None, expected: int) -> None:
    owner = owned(model_host)
    with pytest.raises(KvmError) as caught:
        SevGuest(model_host, dh_cert=dh or owner.dh_cert, session=session or owner.session)
    assert caught.value.fw_error == expected


def test_status_counts_guests(model_host: Any) -> None:
    with SevPlatform(model_host) as platform:
        assert (platform.status().state, platform.status().guest_count) == (psp.SEV_PLATFORM_INIT, 0)
        with SevGuest(model_host) as guest:
            assert (platform.status().state, platform.status().guest_count) == (psp.SEV_PLATFORM_WORKING, 1)
            status = guest_status(guest.vm)
            assert (status.handle, status.policy, status.state) == (guest.running.handle, 0, sev.SEV_STATE_RUNNING)
        assert platform.status().guest_count == 0


def test_the_platforms_chain(model_host: Any) -> None:
    with SevPlatform(model_host) as platform:
        pdh, chain = platform.pdh_cert_export()
        size = ctypes.sizeof(cert.sev_cert) if hasattr(cert, "sev_cert") else 2084
        assert len(pdh) == size and len(chain) == 3 * size
        pek = parse_cert(chain[:size])
        assert cert_signed_by(parse_cert(pdh), pek)
        assert (pdh, chain) == platform.pdh_cert_export(), "the same keys each time"


def issue(platform: SevPlatform, cmd: int, data: int) -> tuple[int, int]:
    argument = psp.sev_issue_cmd(cmd=cmd, data=data, error=0x5A5A5A5A)
    return -platform.ioctl_raw(psp.SEV_ISSUE_CMD, ctypes.addressof(argument)), argument.error


def test_dev_sev_errors(model_host: Any) -> None:
    with SevPlatform(model_host) as platform:
        query = psp.sev_user_data_pdh_cert_export()
        assert issue(platform, psp.SEV_PDH_CERT_EXPORT, ctypes.addressof(query)) == (EIO, psp.SEV_RET_INVALID_LEN)
        assert (query.pdh_cert_len, query.cert_chain_len) == (2084, 3 * 2084)
        buffer = ctypes.create_string_buffer(0x5000)
        at = ctypes.addressof(buffer)
        big = psp.sev_user_data_pdh_cert_export(at, 0x4001, at, 0x4001)
        assert issue(platform, psp.SEV_PDH_CERT_EXPORT, ctypes.addressof(big))[0] == EFAULT
        short = psp.sev_user_data_pdh_cert_export(at, 2083, at, 0x4000)
        assert issue(platform, psp.SEV_PDH_CERT_EXPORT, ctypes.addressof(short)) == (EIO, psp.SEV_RET_INVALID_LEN)
        assert issue(platform, psp.SEV_PLATFORM_STATUS, 8)[0] == EFAULT
        assert issue(platform, 14, at) == (EINVAL, 0x5A5A5A5A)
        assert platform.ioctl_raw(psp.SEV_ISSUE_CMD, 8) == -EFAULT
        assert platform.ioctl_raw(0xAE00, 0) == -EINVAL
        readonly = model_host.open("/dev/sev", os.O_RDONLY)
        model_host.close(readonly)
