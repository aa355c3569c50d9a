"""`sevmm exec`'s command line: what reaches the supervisor, what is refused in one line, and that nothing of it costs other verbs."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from vmm import cli
from vmm.exec.options import PRESETS, CannotExec, ExecOptions, Machine, machine


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[ExecOptions]:
    """A supervisor that runs nothing: it keeps what it was asked for, and ends with 7."""
    kept: list[ExecOptions] = []

    def run(options: ExecOptions) -> int:
        kept.append(options)
        if options.argv[0] == "refused":
            raise CannotExec("no such kernel")
        return 7

    module = ModuleType("vmm.exec.supervisor")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vmm.exec.supervisor", module)
    monkeypatch.setattr("vmm.exec.supervisor", module, raising=False)
    return kept


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--", "prog", "--verbose", "--", "x"], ("prog", "--verbose", "--", "x")),
        (["prog", "--platform", "none"], ("prog", "--platform", "none")),
        (["--verbose", "prog", "-h"], ("prog", "-h")),
        (["--verbose", "--", "--prog"], ("--prog",)),
        (["--", "gdb", "--args", "./vmm", "-m", "1G"], ("gdb", "--args", "./vmm", "-m", "1G")),
    ],
)
def test_what_follows_is_the_programs(argv: list[str], words: tuple[str, ...], asked: list[ExecOptions]) -> None:
    assert cli.main(["exec", *argv]) == 7
    assert asked[0].argv == words
    assert asked[0].machine == PRESETS["sev-es"]


def test_all_options(asked: list[ExecOptions], tmp_path: Path) -> None:
    log = tmp_path / "log"
    machine = "--platform sev,asids=9,min-sev-asid=3 --dialect upm-v7 --fallthrough --cpuid host"
    line = f"exec {machine} --record {log} --record-limit 1M --verbose -- p a"
    assert cli.main(line.split()) == 7
    found = Machine(True, False, 9, 3)
    wanted = ExecOptions(("p", "a"), found, "upm-v7", fallthrough=True, host_cpuid=True, record=log, record_limit=1 << 20, verbose=True)
    assert asked == [wanted]


def test_host_that_cannot_is_4(asked: list[ExecOptions], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["exec", "refused"]) == 4
    assert capsys.readouterr().err == "sevmm exec: this host cannot: no such kernel\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "which program?"),
        (["--"], "which program?"),
        (["--platform", "snp", "x"], "sev-es, sev, none"),
        (["--platform", "sev-es,asids=0", "x"], "1 to 65535"),
        (["--platform", "asids=65536", "x"], "1 to 65535"),
        (["--platform", "asids=1,asids=2", "x"], "twice"),
        (["--platform", "min-sev-asid=17", "x"], "1..15"),
        (["--platform", "debug-swap=yes", "x"], "on or off"),
        (["--platform", "sev,debug-swap=on", "x"], "SEV-ES"),
        (["--platform", "none,asids=3", "x"], "no SEV"),
        (["--platform", "sev-es,", "x"], "no setting"),
        (["--dialect", "page-enc-v6", "x"], "attr-v11"),
        (["--record-limit", "1M", "x"], "--record FILE"),
        (["--record-limit", "many", "--record", "f", "x"], "64M"),
        (["--recor", "f", "x"], "sevmm exec: unrecognized arguments: --recor"),
    ],
)
def test_mistakes_are_one_line_and_2(argv: list[str], words: str, asked: list[ExecOptions], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["exec", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("sevmm")
    assert err.count("\n") == 1
    assert words in err
    assert asked == []


def test_platforms_are_the_models() -> None:
    from kvmapi.abi.kvm import KVM_X86_SEV_ES_VM, KVM_X86_SEV_VM

    def types(text: str) -> tuple[bool, bool]:
        offered = machine(text).platform().vm_types
        return bool(offered >> KVM_X86_SEV_VM & 1), bool(offered >> KVM_X86_SEV_ES_VM & 1)

    assert types("sev-es") == (True, True)
    assert types("sev") == (True, False)
    assert types("none") == (False, False)
    assert types("sev-es,min-sev-asid=1") == (True, False)
    assert types("min-sev-asid=16") == (False, True)
    assert machine("debug-swap=on").platform().vmsa_features == 1 << 5
    assert machine("memlock=on").platform().memlock
    assert not machine("memlock=off").platform().memlock
    assert machine("sev").platform("upm-v6").dialect.name == "upm-v6"


def test_other_verbs_do_not_pay() -> None:
    code = "import sys; from vmm.cli.parser import parse; parse(['exec', '--platform', 'sev', '--', 'x']); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    assert "vmm.cli.exec_options" in loaded
    assert not [name for name in loaded if name.startswith(("kvmapi.model", "vmm.exec.supervisor", "kvmapi.table", "unicorn"))]
