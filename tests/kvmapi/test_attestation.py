"""Attestation reports: what is wrong with one is found and said; and the model's firmware, asked through the launch's objects."""

import ctypes
import mmap
import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from kvmapi import certificates
from kvmapi.abi import cert as c
from kvmapi.abi import kvm, psp
from kvmapi.attestation import AttestationError, AttestationReport
from kvmapi.errors import KvmError, LaunchOrderError
from kvmapi.launch import Launch, Measured, Running, Started
from kvmapi.measurement import LaunchDigest
from kvmapi.sev import SevPlatform
from kvmapi.system import System

NONCE = bytes(range(16))
MEMORY = 1 << 20


@pytest.fixture(scope="module")
def pek() -> Any:
    return certificates.new_key()


def signed(pek: Any, **changes: Any) -> tuple[bytes, bytes]:
    """A report and the PEK certificate, with what `changes` says wrong in it before it is signed."""
    report = c.sev_attestation_report(policy=3, sig_usage=c.SEV_USAGE_PEK, sig_algo=c.SEV_ALGO_ECDSA_SHA256)
    report.mnonce[:], report.launch_digest[:] = NONCE, b"d" * 32
    for name, value in changes.items():
        setattr(report, name, value)
    report.sig1[:] = certificates.sign(pek, bytes(report)[:52])
    return bytes(report), bytes(certificates.make_cert(pek.public_key(), c.SEV_USAGE_PEK, c.SEV_ALGO_ECDSA_SHA256))


def test_a_right_report(pek: Any) -> None:
    data, certificate = signed(pek)
    report = AttestationReport.parse(data)
    assert (report.nonce, report.digest, report.policy) == (NONCE, b"d" * 32, 3)
    report.verify(certificate, nonce=NONCE)
    report.verify(certificate, nonce=NONCE, digest=b"d" * 32, policy=3)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"nonce": bytes(16)}, "answers nonce 000102.*an old report"),
        ({"digest": bytes(32)}, "launched from digest 6464"),
        ({"policy": 1}, "launched with policy 0x3, not 0x1"),
    ],
)
def test_a_report_about_something_else(pek: Any, more: dict[str, Any], words: str) -> None:
    data, certificate = signed(pek)
    with pytest.raises(AttestationError, match=words):
        AttestationReport.parse(data).verify(certificate, **{"nonce": NONCE, **more})


def test_every_changed_byte_that_counts_is_found(pek: Any) -> None:
    data, certificate = signed(pek)
    for at in (0, 15, 16, 47, 48, 51, 52, 56, 64, 136):
        bad = bytearray(data)
        bad[at] ^= 1
        with pytest.raises(AttestationError):
            AttestationReport.parse(bytes(bad)).verify(certificate, nonce=NONCE)


def test_who_signed(pek: Any) -> None:
    data, certificate = signed(pek, sig_usage=c.SEV_USAGE_CEK)
    with pytest.raises(AttestationError, match="signed by CEK"):
        AttestationReport.parse(data).verify(certificate, nonce=NONCE)
    data, _ = signed(pek)
    other = bytes(certificates.make_cert(certificates.new_key().public_key(), c.SEV_USAGE_PEK, c.SEV_ALGO_ECDSA_SHA256))
    with pytest.raises(AttestationError, match="not by this PEK"):
        AttestationReport.parse(data).verify(other, nonce=NONCE)
    pdh = bytes(certificates.make_cert(pek.public_key(), c.SEV_USAGE_PDH, c.SEV_ALGO_ECDH_SHA256))
    with pytest.raises(AttestationError, match="cannot be used"):
        AttestationReport.parse(data).verify(pdh, nonce=NONCE)
    for size in (0, 207, 209):
        with pytest.raises(AttestationError, match="208 bytes"):
            AttestationReport.parse(bytes(size))


# -- through a launch ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def started(model_host: Any, request: pytest.FixtureRequest) -> Iterator[tuple[Started, SevPlatform, int]]:
    """A launch with one measured page at the start of MEMORY bytes, and the address of these; the policy is the test's parameter."""
    with ExitStack() as stack:
        system = stack.enter_context(System(model_host))
        memory = mmap.mmap(-1, MEMORY)
        stack.callback(memory.close)
        vm = stack.enter_context(system.create_vm(kvm.KVM_X86_SEV_VM))
        platform = stack.enter_context(SevPlatform(model_host))
        launch = Launch(vm, platform).init2()
        hva = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        vm.set_user_memory_region(0, 0, MEMORY, hva)
        memory[:4096] = b"m" * 4096
        step = launch.start(request.param)
        step.update_data(hva, 4096)
        yield step, platform, hva


@pytest.mark.model
@pytest.mark.parametrize("started", [2], indirect=True)
def test_the_firmware_attests_on_every_step(started: tuple[Started, SevPlatform, int]) -> None:
    step, platform, _ = started
    _, chain = platform.pdh_cert_export()
    digest = LaunchDigest().update_data(b"m" * 4096).digest()

    def attest(step: Measured | Running) -> None:
        nonce = secrets.token_bytes(16)
        report = AttestationReport.parse(step.attestation_report(nonce))
        report.verify(chain[:2084], nonce=nonce, digest=digest, policy=2)

    measured = step.measure()
    attest(measured)
    running = measured.finish()
    attest(running)
    with pytest.raises(LaunchOrderError):
        measured.attestation_report(NONCE)
    with pytest.raises(ValueError, match="16 bytes"):
        running.attestation_report(b"short")


@pytest.mark.model
@pytest.mark.parametrize("started", [2], indirect=True)
def test_debugging_reads_and_writes_private_memory(started: tuple[Started, SevPlatform, int]) -> None:
    step, _, hva = started
    assert ctypes.string_at(hva, 4096) != b"m" * 4096
    running = step.measure().finish()
    assert running.dbg_decrypt(hva + 3, 50) == b"m" * 50
    running.dbg_encrypt(hva + 7, b"hello")
    assert running.dbg_decrypt(hva, 16) == b"mmmmmmmhellommmm"
    assert ctypes.string_at(hva, 16) != b"mmmmmmmhellommmm"


@pytest.mark.model
@pytest.mark.parametrize("started", [1], indirect=True)
def test_a_policy_without_debugging_is_kept(started: tuple[Started, SevPlatform, int]) -> None:
    step, _, hva = started
    before = ctypes.string_at(hva, 4096)
    running = step.measure().finish()
    for call in (lambda: running.dbg_decrypt(hva, 16), lambda: running.dbg_encrypt(hva, bytes(16))):
        with pytest.raises(KvmError) as caught:
            call()
        assert caught.value.fw_error == psp.SEV_RET_POLICY_FAILURE
    assert ctypes.string_at(hva, 4096) == before
