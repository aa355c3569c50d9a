"""run_guest: the whole way from a request to a report, the bad requests, the hostile guests, the clean end."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from guest import patterns
from tests.conftest import PATIENCE
from tests.vmm import flat
from vmm.machine import Machine
from vmm.run import GuestRequest, run_guest

MIB = 1 << 20
KEYS = [
    "guest", "type", "dialect", "rung", "rung_reason", "result", "exit_code",
    "console", "exits", "conversions", "map", "launch", "elapsed_s",
]  # fmt: skip
pytestmark = pytest.mark.usefixtures("no_leaks")


def run(guest: str, **more: Any) -> Any:
    return run_guest(GuestRequest(guest, **more))


# -- bundled guests ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.gcc
@pytest.mark.parametrize(
    ("guest", "type"),
    [
        ("hello", "plain"), ("hello", "sw-protected"), ("hello", "sev"),
        ("exits", "plain"), ("exits", "sw-protected"), ("exits", "sev"),
        ("convert", "plain"), ("convert", "sw-protected"), ("convert", "sev"),
        ("fault", "sw-protected"), ("private-memory", "sw-protected"), ("private-memory", "sev"),
        ("hello", "sev-es"), ("exits", "sev-es"), ("convert", "sev-es"), ("private-memory", "sev-es"),
    ],
)  # fmt: skip
def test_bundled_guests_pass_on_the_model(model_host: Any, guest: str, type: str) -> None:
    report = run(guest, type=type, host=model_host, memory=16 * MIB)
    assert (report.result, report.exit_code, report.exit_status) == ("pass", 0, 0), (report.console, report.message)
    assert (report.launch is not None) == type.startswith("sev")
    assert report.launch is None or report.launch.match
    shape = json.loads(report.dumps())
    assert list(shape) == KEYS
    assert sum(r["size"] for r in shape["map"]) == 16 * MIB
    if guest == "private-memory":
        assert {c["to"] for c in shape["conversions"]} == {"private", "shared"}
        assert {c["cause"] for c in shape["conversions"]} == {"explicit"}
        assert report.exits["HYPERCALL"] == report.conversions_total
    if guest == "fault":
        assert {(c["to"], c["cause"]) for c in shape["conversions"]} == {("shared", "implicit")}
        assert report.exits["MEMORY_FAULT"] == len(report.conversions)


@pytest.mark.gcc
@pytest.mark.kvm
@pytest.mark.parametrize("guest", ["hello", "exits"])
def test_plain_guests_pass_on_the_kernel(guest: str) -> None:
    report = run(guest, type="plain", on="kernel", vcpus=2)
    assert (report.result, report.rung) == ("pass", "kernel"), (report.console, report.message)


@pytest.mark.gcc
def test_a_sev_launch_is_measured_and_matches(model_host: Any) -> None:
    first = run("hello", type="sev", host=model_host).launch
    second = run("hello", type="sev", host=model_host, policy=1).launch
    assert first is not None
    assert second is not None
    assert first.match
    assert second.match
    assert (first.policy, second.policy) == (3, 1)
    assert first.measure == first.expected
    assert first.digest == second.digest, "the digest is over the contents alone"
    assert first.measure != second.measure
    assert len(first.nonce) == 16
    other = run("hello", type="sev", host=model_host, arguments="x").launch
    assert other is not None
    assert other.digest != first.digest, "the boot info is measured too"


@pytest.mark.gcc
def test_a_wrong_measurement_keeps_the_guest_from_running(model_host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvmapi.measurement import LaunchDigest

    monkeypatch.setattr(LaunchDigest, "digest", lambda self: bytes(32))
    report = run("hello", type="sev", host=model_host)
    assert report.result == "error"
    assert "measurement" in report.message
    assert report.launch is not None
    assert not report.launch.match
    assert report.console == ""


# -- how runs end ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.gcc
def test_a_timeout_and_a_crash_are_results(model_host: Any) -> None:
    report = run("spin", host=model_host, timeout=0.2, type="plain")
    assert (report.result, report.exit_code, report.exit_status) == ("timeout", None, 124)
    assert 0.19 < report.elapsed_s < 2
    report = run("crash", host=model_host, type="plain")
    assert (report.result, report.exit_status) == ("fail", 0x7F)
    assert "#UD" in report.console


@pytest.mark.gcc
def test_console_output_comes_as_it_is_made(model_host: Any) -> None:
    pieces: list[bytes] = []
    report = run("hello", type="plain", host=model_host, console=pieces.append)
    assert len(pieces) >= 3
    assert b"".join(pieces).decode() == report.console


@pytest.mark.gcc
def test_a_console_that_breaks_stops_the_guest_and_passes_through(model_host: Any) -> None:
    def sink(data: bytes) -> None:
        raise BrokenPipeError(errno.EPIPE, "gone")

    with pytest.raises(BrokenPipeError):
        run("hello", type="plain", host=model_host, console=sink)


# -- bad requests ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"guest": "no-such-guest"}, "neither a bundled guest"),
        ({"guest": "./no/such.elf"}, "no such file"),
        ({"guest": "/"}, "is a directory"),
        ({"guest": "/etc/passwd"}, "no ELF64 executable"),
        ({"memory": MIB}, "too little"),
        ({"memory": 20 * MIB + 1}, "2 MiB"),
        ({"vcpus": 0}, "1 to 64"),
        ({"vcpus": 1000}, "1 to 64"),
        ({"type": "tdx"}, "no VM type"),
        ({"on": "moon"}, "no rung"),
        ({"dialect": "upm-v6"}, "no dialect"),
        ({"guest": "private-memory", "type": "plain"}, "runs on type sev or sev-es or sw-protected, not on plain"),
        ({"policy": 3, "type": "plain"}, "policy"),
        ({"timeout": 0}, "time limit"),
        ({"timeout": -1.0}, "time limit"),
        ({"arguments": "x" * 1024}, "1023"),
    ],
)
@pytest.mark.gcc
def test_bad_requests_get_one_sentence_and_exit_status_2(more: dict[str, Any], word: str) -> None:
    report = run(**{"guest": "hello", "on": "model", **more})
    assert (report.result, report.exit_status, report.exit_code) == ("error", 2, None)
    assert word in report.message
    assert "\n" not in report.message
    assert list(json.loads(report.dumps())) == KEYS


def test_a_host_that_fails_is_an_error_with_the_ioctls_name(model_host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvmapi.abi import ioctls

    real = model_host.ioctl
    monkeypatch.setattr(
        model_host, "ioctl", lambda fd, request, arg=0: -errno.ENOMEM if request == ioctls.KVM_CREATE_VCPU else real(fd, request, arg)
    )
    report = run(flat.write(tmp_path, flat.HALT), host=model_host)
    assert (report.result, report.exit_status) == ("error", 70)
    assert "KVM_CREATE_VCPU" in report.message


def test_a_lock_limit_that_is_too_low_is_named_with_its_remedy(model_host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_host, "memlock_limit", lambda: MIB)
    report = run(flat.write(tmp_path, flat.HALT), type="sev", host=model_host)
    assert (report.result, report.exit_status) == ("error", 70)
    assert "RLIMIT_MEMLOCK" in report.message
    assert "65536 KiB" in report.message
    assert "ulimit -l" in report.remedy


def test_every_ioctl_that_fails_leaves_nothing_behind(model_host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the n-th call at the seam, for every n of a SEV run: each ends in a report, and the fixture finds no leak."""
    guest = flat.write(tmp_path, b"\x31\xc0" + flat.exit_with_eax())
    real = model_host.ioctl
    calls = fail_at = 0

    def ioctl(fd: int, request: int, arg: int = 0) -> int:
        nonlocal calls
        calls += 1
        return -errno.EPERM if calls == fail_at else real(fd, request, arg)

    monkeypatch.setattr(model_host, "ioctl", ioctl)
    assert run(guest, type="sev", host=model_host, memory=16 * MIB).result == "pass"
    total = calls
    assert total > 20
    results = []
    while fail_at < total:
        fail_at += 1
        calls = 0
        results.append(run(guest, type="sev", host=model_host, memory=16 * MIB).result)
    assert results.count("error") > total * 0.8, results


# -- hostile guests ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", ["plain", "sw-protected", "sev"])
@pytest.mark.parametrize(
    ("gpa", "pages", "attributes"),
    [
        (0x800001, 1, 0x10),
        (0x800000, 0, 0x10),
        (0x800000, (1 << 64) - 1, 0x10),
        (0x800000, 1 << 52, 0x10),
        (0x800000, 1 << 40, 0),
        ((1 << 64) - 0x1000, 1, 0x10),
        (1 << 51, 1, 0x10),
        (0xFFF000, 2, 0x10),
        (0xD0000000, 1, 0),
        (0x800000, 1, 0x20),
        (0x800000, 1, (1 << 63) | 0x10),
        (0x800000, 1, 0x13),
    ],
)
def test_hostile_conversions_get_einval_and_change_nothing(
    model_host: Any, tmp_path: Path, type: str, gpa: int, pages: int, attributes: int
) -> None:
    code = flat.hypercall(gpa, pages, attributes) + flat.NEGATE + flat.exit_with_eax()
    before = run(flat.write(tmp_path, b"\x31\xc0" + flat.exit_with_eax()), type=type, host=model_host, memory=16 * MIB)
    report = run(flat.write(tmp_path, code), type=type, host=model_host, memory=16 * MIB)
    assert (report.result, report.exit_code) == ("fail", errno.EINVAL), report.message
    assert report.conversions_total == 0
    assert list(report.map) == list(before.map)


def test_a_refused_hypercall_is_noted(model_host: Any, tmp_path: Path) -> None:
    code = flat.hypercall(0x800000, 1, 0x20) + flat.NEGATE + flat.exit_with_eax()
    report = run(flat.write(tmp_path, code), host=model_host)
    assert report.notes == ["1 hypercalls of the guest were refused, the last one: reserved attribute bits 0x20 at gpa 0x800000"]


def test_a_guest_that_converts_for_ever_is_bounded(model_host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmm import conversion

    monkeypatch.setattr(conversion.Converter.__init__, "__defaults__", (None, 50))
    # mov ecx pages etc. once, then: 1: mov eax, 12; xor dl, 0x10; vmmcall; jmp 1b
    code = flat.hypercall(0x800000, 1, 0) + b"\xb8\x0c\x00\x00\x00\x80\xf2\x10\x0f\x01\xd9\xeb\xf3"
    report = run(flat.write(tmp_path, code), type="sev", host=model_host, timeout=0.5 * PATIENCE)
    assert report.result == "timeout"
    assert report.conversions_total > 500
    assert len(report.conversions) == 50


def test_every_other_page_private_is_reported_in_a_bounded_way(model_host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmm import run as run_module

    monkeypatch.setattr(run_module, "MAP_ROWS", 10)
    # rbx: gpa from 8 MiB in steps of two pages, 20 times
    code = flat.hypercall(0x800000, 1, 0x10) + b"\xb8\x0c\x00\x00\x00\x48\x81\xc3\x00\x20\x00\x00\x0f\x01\xd9"
    code += b"\x48\x81\xfb" + (0x800000 + 20 * 0x2000).to_bytes(4, "little") + b"\x75\xe8\x31\xc0" + flat.exit_with_eax()
    report = run(flat.write(tmp_path, code), type="plain", host=model_host)
    assert report.result == "pass", report.message
    assert report.conversions_total == 21
    assert len(report.map) == 10
    assert "more than 10 ranges" in report.notes[-1]


def test_unknown_hypercalls_are_answered_as_kvm_does(model_host: Any, tmp_path: Path) -> None:
    code = flat.hypercall(0, 0, 0, number=99) + flat.NEGATE + b"\x2d\xe8\x03\x00\x00" + flat.exit_with_eax()  # -(-1000) - 1000
    assert run(flat.write(tmp_path, code), host=model_host).exit_code == 0


# -- what the VMM can see ----------------------------------------------------------------------------------------------------------------


@pytest.mark.gcc
@pytest.mark.parametrize("type", ["sev", "sw-protected"])
@pytest.mark.parametrize("leak", [False, True])
def test_the_private_pattern_is_nowhere_in_what_the_vmm_sees(model_host: Any, type: str, leak: bool) -> None:
    """While the guest is stopped with its pattern in private memory, search all of its memory; the control leaves it in a shared page."""
    found: dict[int, bool] = {}
    needles = [patterns.pattern_private(page << 12, 16) for page in range(patterns.PRIVATE_PAGES)]

    def look(machine: Machine, stage: int) -> None:
        found[stage] = any(slot.map.find(needle) >= 0 for slot in machine.memory.slots for needle in needles)

    report = run("private-memory", type=type, host=model_host, memory=16 * MIB, arguments="leak" if leak else "", on_stage=look)
    assert report.result == "pass", report.console
    assert found == {1: False, 2: False, 3: False, 4: leak}
