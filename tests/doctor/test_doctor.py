"""Verdicts per rung on made-up machines: nothing there, a paravirtual KVM, SW_PROTECTED, a SEV host; and this machine, whatever it is."""

import errno
import json

import pytest

from kvmapi.abi import caps, ioctls
from tests.doctor.conftest import Machine, PlayedHost
from vmm import cli, doctor, facts
from vmm.cli import doctor as doctor_verb
from vmm.facts import NO, OK, UNKNOWN

AMD = "vendor_id\t: AuthenticAMD\nmodel name\t: EPYC\nflags\t\t: fpu svm sev sev_es\n"


def sev_host() -> PlayedHost:
    return PlayedHost(
        capabilities={
            caps.KVM_CAP_VM_TYPES: 0xF, caps.KVM_CAP_EXIT_HYPERCALL: 0x1000, caps.KVM_CAP_GUEST_MEMFD: 1,
            caps.KVM_CAP_GUEST_MEMFD_FLAGS: 3, caps.KVM_CAP_MEMORY_ATTRIBUTES: 8, caps.KVM_CAP_MEMORY_FAULT_INFO: 1,
            caps.KVM_CAP_VM_COPY_ENC_CONTEXT_FROM: 1, caps.KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM: 1,
        },
        answers={ioctls.KVM_MEMORY_ENCRYPT_OP: 0, ioctls.KVM_SET_MEMORY_ATTRIBUTES: 0, ioctls.KVM_HAS_DEVICE_ATTR: 0},
    )  # fmt: skip


def test_bare_machine(machine: Machine) -> None:
    """No /dev, no /proc, no /sys, no gcc: every fact is there, only the model runs, nothing raises."""
    found = doctor.examine(machine())
    assert [(rung.name, rung.on, rung.state) for rung in found.rungs] == [
        ("sev-es", "kernel", NO), ("sev", "kernel", NO), ("sw-protected", "kernel", NO), ("plain", "kernel", NO), ("model", "model", OK),
    ]  # fmt: skip
    assert "ENOENT" in found.fact("dev-kvm").evidence
    assert "modprobe" in found.fact("dev-kvm").remedy
    assert found.fact("cpu").state == UNKNOWN
    assert found.fact("gcc").remedy == "apt install gcc"
    assert "plain, sw-protected, sev" in found.fact("model").evidence
    json.dumps(found.to_json())


def test_paravirtual_kvm(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Capabilities that say yes and calls that say ENOTTY: the calls win, and the words say so."""
    from vmm import probe

    monkeypatch.setattr(probe, "hypercall_exits", lambda _host, cache: False)
    host = PlayedHost(
        capabilities={
            caps.KVM_CAP_VM_TYPES: 1, caps.KVM_CAP_EXIT_HYPERCALL: 0x1000, caps.KVM_CAP_GUEST_MEMFD: 1, caps.KVM_CAP_GUEST_MEMFD_FLAGS: 3,
            caps.KVM_CAP_VM_COPY_ENC_CONTEXT_FROM: 1, caps.KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM: 1,
        }
    )  # fmt: skip
    found = doctor.examine(machine({"/dev/kvm": ""}, host, probe_guests=True))
    assert found.rung("plain").state == OK
    assert "but hypercall exits: answers capability 0x1000" in found.rung("plain").reason
    assert found.rung("sev").state == found.rung("sw-protected").state == NO
    assert "KVM_CAP_VM_TYPES = 0x1: plain only" in found.rung("sev").reason
    assert "it spins inside KVM_RUN" in found.fact("hypercall-exits").evidence
    assert "use --on model" in found.fact("hypercall-exits").remedy
    assert "ENOTTY" in found.fact("encrypt-op").evidence
    assert "no evidence of SEV" in found.fact("enc-context").evidence
    assert "MMAP, INIT_SHARED" in found.fact("guest-memfd").evidence
    assert host.opened == set()


def test_sev_host(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmm import doctor_machine, probe

    monkeypatch.setattr(probe, "hypercall_exits", lambda _host, cache: True)
    monkeypatch.setattr(doctor_machine, "_has_capability", lambda _number: True)
    files = {"/dev/kvm": "", "/dev/sev": "", "/proc/cpuinfo": AMD, "/sys/module/kvm_amd/parameters/sev": "Y\n", "/sys/module/kvm/x": ""}
    host = sev_host()
    found = doctor.examine(machine(files, host, probe_guests=True))
    assert {rung.name: rung.state for rung in found.rungs} == dict.fromkeys(("sev-es", "sev", "sw-protected", "plain", "model"), OK)
    assert found.fact("cpu-sev").state == OK
    assert found.fact("kvm-amd").evidence.endswith("sev=Y, sev_es=absent, sev_snp=absent")
    assert doctor.reason_missing("sev", machine(files, host, probe_guests=True)) is None
    assert host.opened == set()


def test_sev_host_without_its_device_node(machine: Machine) -> None:
    host = sev_host()
    found = doctor.examine(machine({"/dev/kvm": ""}, host))
    assert found.rung("sev").state == NO
    assert "/dev/sev" in found.rung("sev").reason


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOENT, errno.ENXIO, errno.EBUSY])
def test_host_that_does_not_open(machine: Machine, number: int) -> None:
    found = doctor.examine(machine({"/dev/kvm": ""}, PlayedHost(open_error=number)))
    assert errno.errorcode[number] in found.fact("kvm").evidence
    assert found.rung("plain").state == NO


def test_no_vm_can_be_made(machine: Machine) -> None:
    host = PlayedHost(answers={ioctls.KVM_CREATE_VM: -errno.ENOMEM})
    found = doctor.examine(machine({"/dev/kvm": ""}, host))
    assert "ENOMEM" in found.rung("plain").reason
    assert found.fact("encrypt-op").state == UNKNOWN
    assert host.opened == set()


def test_something_else_behind_the_node(machine: Machine) -> None:
    host = PlayedHost(answers={ioctls.KVM_GET_API_VERSION: -errno.ENOTTY})
    found = doctor.examine(machine({"/dev/kvm": ""}, host))
    assert "not Linux's KVM" in found.fact("kvm").evidence
    assert host.opened == set()


def test_model_that_cannot_start(machine: Machine) -> None:
    def no_unicorn() -> PlayedHost:
        raise ModuleNotFoundError("No module named 'unicorn'", name="unicorn")

    found = doctor.examine(machine(open_model=no_unicorn))
    assert found.rung("model").state == NO
    assert "pip install unicorn" in found.rung("model").remedy


@pytest.mark.parametrize("kind", doctor.KINDS)
def test_reason_missing_says_how_to_get_it(machine: Machine, kind: str) -> None:
    reason = doctor.reason_missing(kind, machine())
    if kind == "model":
        assert reason is None
    else:
        assert reason is not None
        assert "; get it: " in reason


def test_reason_missing_of_what_nobody_knows(machine: Machine) -> None:
    with pytest.raises(ValueError, match="tdx"):
        doctor.reason_missing("tdx", machine())


def test_every_no_has_a_remedy(machine: Machine) -> None:
    found = doctor.examine(machine())
    assert [fact.name for fact in found.facts if fact.state == NO and not fact.remedy] == []


def test_json_keys_and_exit_status(machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    where = machine()
    monkeypatch.setattr(doctor_verb, "examine", lambda: doctor.examine(where))
    assert cli.main(["doctor", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert list(data) == ["rungs", "facts"]
    assert all(list(rung) == ["name", "on", "state", "reason", "remedy", "facts"] for rung in data["rungs"])
    assert all(list(fact) == ["name", "title", "state", "evidence", "remedy"] for fact in data["facts"])
    names = [fact["name"] for fact in data["facts"]]
    assert len(set(names)) == len(names)
    nothing = doctor.Diagnosis((doctor.RungVerdict("model", "model", NO, "r", "m", ()),), ())
    monkeypatch.setattr(doctor_verb, "examine", lambda: nothing)
    assert cli.main(["doctor"]) == 4


def test_text_wraps_on_a_terminal_only(machine: Machine) -> None:
    from io import StringIO

    from vmm.cli.style import Style

    found = doctor.examine(machine())
    plain = list(doctor_verb.lines(found, Style(StringIO())))
    assert any(found.fact("dev-kvm").remedy in line for line in plain)
    assert max(map(len, doctor_verb.lines(found, Style(StringIO()), 80))) <= 80


def test_this_machine(no_leaks: None) -> None:
    """Whatever this machine is, examining it ends with a verdict per rung and leaves nothing open."""
    found = doctor.examine(facts.Surroundings())
    assert len(found.rungs) == 5
    assert all(fact.evidence for fact in found.facts)


@pytest.mark.kvm
def test_this_kernel_answers() -> None:
    found = doctor.examine()
    assert found.fact("kvm").state == OK
    assert found.rung("plain").state == OK


@pytest.mark.parametrize("type", ["plain", "sw-protected", "sev", "sev-es"])
def test_run_and_doctor_agree(type: str) -> None:
    """The rung that `run --on kernel` takes or refuses is the one the doctor calls ok or not."""
    from vmm import rungs

    try:
        rungs.choose(type, "kernel")
        taken = True
    except rungs.Unsupported:
        taken = False
    assert (doctor.examine().rung(type).state == OK) == taken
