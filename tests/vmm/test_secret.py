"""A secret on its way from its owner to a guest: it arrives, it is proved, and nobody on the way shows it."""

import gc
import hashlib
import io
from pathlib import Path
from typing import Any

import pytest

from kvmapi.errors import KvmError
from kvmapi.launch import Measured
from kvmapi.session import OwnerError, OwnerSession
from tests.vmm import flat
from vmm import boot
from vmm.cli import summary
from vmm.config import ConfigError, MachineConfig
from vmm.machine import Machine
from vmm.run import GuestRequest, run_guest

MIB = 1 << 20
SECRET = b"correct horse battery staple, said the owner"
pytestmark = pytest.mark.usefixtures("no_leaks")

EXIT_WITH_MAGIC = b"\xa1" + (boot.SECRET_PAGE).to_bytes(8, "little") + flat.exit_with_eax()  # mov eax, [0x6000]; out 0xf4, eax


def request(host: Any, **more: Any) -> GuestRequest:
    return GuestRequest(**{"guest": "secret", "type": "sev", "host": host, "memory": 16 * MIB, "secret": SECRET, **more})


@pytest.mark.gcc
@pytest.mark.model
@pytest.mark.parametrize(
    ("secret", "arguments", "nonce"),
    [
        (SECRET, "nonce=4711", b"4711"),
        (SECRET, "", b""),
        (b"\0", "other nonce=a b", b"a"),
        (bytes(range(256)) * 15 + bytes(240), "nonce=", b""),
    ],
)
@pytest.mark.parametrize("type", ["sev", "sev-es"])
def test_the_guest_proves_it(model_host: Any, type: str, secret: bytes, arguments: str, nonce: bytes) -> None:
    report = run_guest(request(model_host, type=type, secret=secret, arguments=arguments))
    assert (report.result, report.message) == ("pass", "")
    assert f" = {hashlib.sha256(nonce + secret).hexdigest()}\n" in report.console
    assert f"secret: {len(secret)} bytes arrived\n" in report.console
    assert "secret: an alias without C-bit shows nothing\n" in report.console


@pytest.mark.gcc
@pytest.mark.model
def test_without_one_the_guest_says_so_and_fails(model_host: Any) -> None:
    report = run_guest(request(model_host, secret=None))
    assert (report.result, report.exit_code, report.console) == ("fail", 1, "secret: no secret arrived\n")


@pytest.mark.gcc
@pytest.mark.model
def test_nothing_of_the_vmm_shows_it(model_host: Any) -> None:
    """Everything a user can get to see, and memory as the VMM sees it at the guest's end; in any spelling."""
    seen: list[str] = []
    asked = request(model_host, arguments="nonce=1", console=lambda data: seen.append(repr(data)))
    report = run_guest(asked)
    text = io.StringIO()
    summary.show(report, text)
    shown = "\n".join([*seen, report.dumps(), repr(report), repr(asked), report.console, report.message, text.getvalue(), *report.notes])
    assert report.result == "pass"
    for spelling in (SECRET.decode(), SECRET.hex(), "horse", SECRET[:8].hex()):
        assert spelling not in shown


@pytest.mark.model
def test_memory_shows_ciphertext_and_the_guest_plaintext(model_host: Any) -> None:
    config = MachineConfig(flat.image(EXIT_WITH_MAGIC), model_host, "sev", 16 * MIB, secret=SECRET)
    assert SECRET.decode() not in repr(config)
    with Machine(config) as machine:
        before = machine.memory.read(boot.SECRET_PAGE, boot.PAGE)
        assert machine.run(10).exit_code == boot.SECRET_MAGIC[0]
        assert machine.memory.read(boot.SECRET_PAGE, boot.PAGE) == before
    assert any(before)
    assert SECRET[:16] not in before and boot.SECRET_MAGIC not in before


@pytest.mark.model
def test_the_owners_keys_do_not_outlive_the_launch(model_host: Any) -> None:
    with Machine(MachineConfig(flat.image(flat.HALT), model_host, "sev", 16 * MIB, secret=SECRET)):
        gc.collect()
        assert not [found for found in gc.get_objects() if isinstance(found, OwnerSession)]


@pytest.mark.model
def test_a_guest_that_was_measured_wrong_gets_nothing(model_host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host changes a byte between the owner's look and the measurement."""
    from kvmapi.launch import Started
    from vmm.memory import GuestMemory

    given: list[object] = []
    monkeypatch.setattr(Measured, "secret", lambda self, *arguments: given.append(arguments))
    real, memories = Started.update_data, []
    monkeypatch.setattr(GuestMemory, "hva", lambda self, gpa, size=1, hva=GuestMemory.hva: memories.append(self) or hva(self, gpa, size))

    def tamper(self: Started, hva: int, size: int) -> None:
        if len(given) == 0 and memories:
            memories[0].write(boot.BOOT_INFO + 8, b"\x77")
        real(self, hva, size)

    monkeypatch.setattr(Started, "update_data", tamper)
    with Machine(MachineConfig(flat.image(flat.HALT), model_host, "sev", 16 * MIB, secret=SECRET)) as machine:
        assert machine.launch is not None and not machine.launch.match
        assert "measurement is not the expected one" in machine.run(10).message
    assert given == []
    memories.clear()


@pytest.mark.model
def test_a_secret_the_firmware_refuses_is_an_error_without_the_secret(
    model_host: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = Measured.secret

    def other_header(self: Measured, header: bytes, ciphertext: bytes, hva: int) -> None:
        real(self, header[:-1] + bytes([header[-1] ^ 1]), ciphertext, hva)

    monkeypatch.setattr(Measured, "secret", other_header)
    report = run_guest(request(model_host, guest=flat.write(tmp_path, flat.HALT)))
    assert (report.result, report.exit_status) == ("error", 70)
    assert "LAUNCH_SECRET" in report.message
    assert "horse" not in report.message and SECRET.hex() not in report.message


# -- requests that make no sense ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"guest": "hello", "type": "plain"}, "only a guest of type sev or sev-es can be given a secret, not one of type plain"),
        ({"guest": "hello", "type": "sw-protected"}, "not one of type sw-protected"),
        ({"guest": "hello"}, "the guest hello does not look for a secret; the guest secret does"),
        ({"type": "plain"}, "the guest secret runs on type sev or sev-es, not on plain"),
    ],
)
def test_other_types_and_guests_are_refused(model_host: Any, more: dict[str, Any], words: str) -> None:
    report = run_guest(request(model_host, **more))
    assert report.exit_status == 2
    assert words in report.message


@pytest.mark.gcc
@pytest.mark.parametrize("size", [0, boot.MAX_SECRET + 1])
def test_a_secret_that_does_not_fit_its_page(model_host: Any, size: int) -> None:
    report = run_guest(request(model_host, secret=bytes(size)))
    assert (report.exit_status, report.message) == (2, f"a secret of {size} bytes: it must have 1 to 4080")
    with pytest.raises(ValueError, match="1 to 4080"):
        boot.secret_page(bytes(size))


def test_plain_machines_have_no_owner(model_host: Any) -> None:
    with pytest.raises(ConfigError, match="no owner"):
        MachineConfig(flat.image(flat.HALT), model_host, secret=SECRET).check()


@pytest.mark.parametrize("size", [1, 15, 16, 17, 4080])
def test_the_secret_page(size: int) -> None:
    page = boot.secret_page(b"s" * size)
    assert len(page) % 16 == 0 and len(page) <= boot.PAGE
    assert page[:16] == b"SEVMMSEC" + size.to_bytes(8, "little")
    assert page[16:] == (b"s" * size).ljust(len(page) - 16, b"\0")


@pytest.mark.model
def test_no_session_seals_for_a_guest_it_did_not_verify(model_host: Any) -> None:
    from kvmapi.sev import SevPlatform

    with SevPlatform(model_host) as platform:
        owner = OwnerSession.create(platform.pdh_cert_export()[0], 1)
    with pytest.raises(OwnerError, match="verify"):
        owner.seal_secret(SECRET, bytes(32))
    right = owner.expected_measure(bytes(32), bytes(16), api_major=0, api_minor=24, build=1)
    assert not owner.verify(right, bytes(32), b"n" * 16, api_major=0, api_minor=24, build=1)
    with pytest.raises(OwnerError, match="verify"):
        owner.seal_secret(SECRET, right)
    assert owner.verify(right, bytes(32), bytes(16), api_major=0, api_minor=24, build=1)
    with pytest.raises(OwnerError, match="verify"):
        owner.seal_secret(SECRET, bytes(32))
    header, packet = owner.seal_secret(SECRET, right)
    assert (len(header), len(packet)) == (52, len(SECRET))


@pytest.mark.model
def test_a_packet_for_another_guest_does_not_open(model_host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was sealed for one launch, given to the next one of the same image."""
    packets: list[tuple[bytes, bytes]] = []
    real = Measured.secret

    def replay(self: Measured, header: bytes, ciphertext: bytes, hva: int) -> None:
        packets.append((header, ciphertext))
        real(self, *packets[0], hva)

    monkeypatch.setattr(Measured, "secret", replay)
    config = MachineConfig(flat.image(flat.HALT), model_host, "sev", 16 * MIB, secret=SECRET)
    Machine(config).close()
    with pytest.raises(KvmError, match="LAUNCH_SECRET"):
        Machine(config)
