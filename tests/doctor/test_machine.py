"""Facts of the machine: device nodes that are absent or closed to this user, CPUID, limits."""

import os
import resource
import struct
import types
from pathlib import Path

import pytest

from tests.doctor.conftest import Machine
from vmm import doctor_machine
from vmm.facts import NO, OK, UNKNOWN


def test_permission_denied_names_the_group(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root nothing is ever denied, so open is played; the node's group and mode are real."""
    where = machine({"/dev/kvm": ""})
    node = where.path("/dev/kvm")
    node.chmod(0o660)

    def denied(*_args: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor_machine, "os", types.SimpleNamespace(**{**vars(os), "open": denied}))
    monkeypatch.setattr(doctor_machine, "_group", lambda _gid: "kvm")
    fact = doctor_machine.device(where, "/dev/kvm")
    assert fact.state == NO
    assert "EACCES" in fact.evidence
    assert "group kvm" in fact.evidence
    if node.stat().st_gid:
        assert "usermod -aG kvm" in fact.remedy
    node.chmod(0o600)
    assert "chmod 660 /dev/kvm" in doctor_machine.device(where, "/dev/kvm").remedy


@pytest.mark.skipif(os.geteuid() == 0, reason="root is never denied; get it: run the tests as another user")
def test_permission_denied_for_real(machine: Machine) -> None:
    where = machine({"/dev/kvm": ""})
    where.path("/dev/kvm").chmod(0)
    assert "EACCES" in doctor_machine.device(where, "/dev/kvm").evidence


def test_cpuid_leaf(machine: Machine) -> None:
    """/dev/cpu/0/cpuid gives 16 bytes at the offset of the leaf: a sparse file plays it."""
    where = machine({"/proc/cpuinfo": "vendor_id : AuthenticAMD\n", "/dev/cpu/0/cpuid": ""})
    with where.path("/dev/cpu/0/cpuid").open("r+b") as file:
        os.pwrite(file.fileno(), struct.pack("<4I", 0xB, 51, 509, 100), 0x8000001F)
    fact = doctor_machine.cpu_sev(where)
    assert fact.state == OK
    assert fact.evidence.startswith("CPUID 0x8000001F: eax 0xb (SME, SEV, SEV-ES), C-bit 51, 509 encrypted guests")


def test_cpu_flags_where_cpuid_cannot_be_read(machine: Machine) -> None:
    fact = doctor_machine.cpu_sev(machine({"/proc/cpuinfo": "vendor_id : AuthenticAMD\nflags : fpu sev\n"}))
    assert (fact.state, fact.evidence) == (OK, "/proc/cpuinfo flags: sev")
    fact = doctor_machine.cpu_sev(machine({"/proc/cpuinfo": "vendor_id : GenuineIntel\nflags : fpu\n"}))
    assert fact.state == NO
    fact = doctor_machine.cpu_sev(machine({"/proc/cpuinfo": "processor : 0\n"}))
    assert fact.state == UNKNOWN


@pytest.mark.parametrize(("sev", "state"), [("Y", OK), ("1", OK), ("N", NO), ("0", NO)])
def test_module_parameter(machine: Machine, sev: str, state: str) -> None:
    fact = doctor_machine.module_parameters(machine({"/sys/module/kvm_amd/parameters/sev": f"{sev}\n"}))
    assert fact.state == state
    assert f"sev={sev}" in fact.evidence


def test_memlock(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine, "_has_capability", lambda _number: False)
    for limit, state in ((8 << 20, NO), (64 << 20, OK), (resource.RLIM_INFINITY, OK)):
        monkeypatch.setattr(resource, "getrlimit", lambda _which, limit=limit: (limit, limit))
        assert doctor_machine.memlock(machine()).state == state
    monkeypatch.setattr(doctor_machine, "_has_capability", lambda _number: True)
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (65536, 65536))
    assert doctor_machine.memlock(machine()).state == OK


def test_tools(machine: Machine, tmp_path: Path) -> None:
    assert doctor_machine.tool(machine(), "gcc", "apt install gcc").missing.endswith("get it: apt install gcc")
    assert doctor_machine.tool(machine(which=lambda name: f"/usr/bin/{name}"), "ld", "apt install binutils").ok


def test_packages_are_those_of_pyproject(tree: Path) -> None:
    import re
    import tomllib

    listed = tomllib.loads((tree / "pyproject.toml").read_text())["project"]["dependencies"]
    assert set(doctor_machine.PACKAGES) == {re.split(r"[<>=]", name)[0] for name in listed}
