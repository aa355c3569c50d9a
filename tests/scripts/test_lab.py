"""scripts/lab without its machine: keys, steps that resume, status, arguments, the table; and one real start, where the lab is set up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

MADISON = """
linux-source-6.1 | 6.1.192-2 | http://mirror.invalid/debian oldstable/main amd64 Packages
linux-source-7.2 | 7.2.13-1 | http://mirror.invalid/debian unstable/main amd64 Packages
linux-source-7.10 | 7.10~rc2-1 | http://mirror.invalid/debian experimental/main amd64 Packages
linux-source-7.3 | 7.3.4-1~bpo13+1 | http://mirror.invalid/debian stable-backports/main amd64 Packages
linux-source-7.3 | 7.3.2-1~bpo13+1 | http://mirror.invalid/debian stable-backports/main amd64 Packages
"""


@pytest.fixture(autouse=True)
def lab(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """lablib can be imported, and has an empty cache; gives the cache."""
    monkeypatch.syspath_prepend(str(tree / "scripts"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "sevmm" / "lab"


def resolved(version: str = "7.3.4-1") -> dict[str, Any]:
    return {"package": "linux-source-7.3", "version": version, "suites": []}


# -- keys and steps ----------------------------------------------------------------------------------------------------------------------


def test_key_is_of_all_inputs_and_nothing_else() -> None:
    from lablib.cache import key_of

    key = key_of("kernel", 1, {"a": "1", "b": "2"})
    assert key == key_of("kernel", 1, {"b": "2", "a": "1"})
    others = {key_of("kernel", 2, {"a": "1", "b": "2"}), key_of("other", 1, {"a": "1", "b": "2"}), key_of("kernel", 1, {"a": "12"})}
    assert len({key, *others}) == 4


def test_kernel_key_follows_source_and_options(monkeypatch: pytest.MonkeyPatch) -> None:
    from lablib import kconfig, kernel, selftests

    before = kernel.kernel_step(resolved()), selftests.selftests_step(resolved())
    assert kernel.kernel_step(resolved("7.3.5-1")).key != before[0].key
    monkeypatch.setitem(kconfig.VALUES, "NR_CPUS", "4")
    assert kernel.kernel_step(resolved()).key != before[0].key
    assert selftests.selftests_step(resolved()).key == before[1].key


def test_step_is_done_once_and_resumes(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lablib.cache import Step
    from lablib.words import Failure

    step = Step("played", 1, {"input": "x"})
    calls: list[bool] = []

    def work(_: object) -> dict[str, Any]:
        half = step.directory / "half"
        calls.append(half.exists())
        half.touch()
        if len(calls) == 1:
            raise Failure("the disk is full")
        return {"answer": 42}

    with pytest.raises(Failure, match=r"step played failed: the disk is full\n.*resumes"):
        step.run(work)
    assert step.result() is None
    assert step.run(work) == step.run(work) == {"answer": 42}
    assert calls == [False, True]
    assert "resuming" in capsys.readouterr().err
    assert step.directory == lab / f"played-{step.key}"
    assert json.loads((step.directory / "complete.json").read_text())["inputs"] == {"input": "x"}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"result": 3}'])
def test_broken_record_is_no_result(text: str) -> None:
    from lablib.cache import Step

    step = Step("played", 1, {})
    step.directory.mkdir(parents=True)
    (step.directory / "complete.json").write_text(text)
    assert step.result() is None


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lablib.cache import Step
    from lablib.words import Failure

    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(Failure, match="XDG_CACHE_HOME"):
        Step("played", 1, {}).run(lambda _: {})


def test_failing_command_keeps_its_log_and_says_why(tmp_path: Path) -> None:
    from lablib.words import Failure, Progress, run_logged

    log = tmp_path / "log"
    script = "echo one; echo 'gcc: fatal error: no input files'; echo three; exit 3"
    with pytest.raises(Failure, match=r"status 3\n  gcc: fatal error: no input files\n.*log"):
        run_logged(["sh", "-c", script], log, Progress("played"))
    assert "one\n" in log.read_text()


# -- where the source comes from ----------------------------------------------------------------------------------------------------------


def test_newest_release_is_taken() -> None:
    from lablib.source import newest

    assert newest(MADISON) == ("linux-source-7.3", "7.3.4-1~bpo13+1")
    assert newest("") is None
    assert newest("linux-source-7.10 | 7.10~rc2-1 | x") is None


@pytest.mark.parametrize(
    ("name", "version"), [("linux-source-7.3", (7, 3)), ("linux-source-6.12", (6, 12)), ("linux-source-7.3-rt", ()), ("linux-source", ())]
)
def test_version_of(name: str, version: tuple[int, ...]) -> None:
    from lablib.source import version_of

    assert version_of(name) == version


def test_suites_come_from_the_configured_mirror(tmp_path: Path) -> None:
    from lablib.source import code_name, source_entries

    site, other = "http://mirror.invalid/debian", "https://tools.invalid/apt"
    lines = [f"{site}|bookworm|main|Debian", f"{site}|bookworm|contrib|Debian", f"{site}-security|bookworm-security|main|Debian"]
    configured, newer = source_entries("\n".join([*lines, f"{other}|x|main|Tools", "noise"]))
    assert configured == [(site, "bookworm"), (f"{site}-security", "bookworm-security"), (other, "x")]
    assert {where for where, _ in newer} == {site}
    assert (site, "stable-backports") in newer
    (tmp_path / "mirror.invalid_debian_dists_stable_InRelease").write_text("Suite: stable\nCodename: trixie\n")
    assert code_name(tmp_path, "stable") == "trixie"
    assert code_name(tmp_path, "stable-backports") == ""


def test_missing_packages_are_named_each_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lablib import packages
    from lablib.words import Failure

    monkeypatch.setenv("PATH", str(tmp_path))
    assert packages.missing("run") == ["qemu-system-x86", "util-linux"]
    lacking = packages.missing("init", "build")
    assert len(lacking) == len(set(lacking))
    assert {"gcc", "flex", "make"} <= set(lacking)
    with pytest.raises(Failure, match=r"lacks qemu-system-x86, util-linux\n.*--install"):
        packages.ensure(("run",), False, tmp_path / "log")


# -- kernel options and initramfs ---------------------------------------------------------------------------------------------------------


def test_options_are_consistent() -> None:
    from lablib import kconfig

    names = kconfig.options()
    assert len(names) == len(set(names))
    assert set(kconfig.MUST) <= set(names)
    assert not set(names) & set(kconfig.OFF)
    assert kconfig.not_taken(kconfig.preset()) == ([], [])
    config = kconfig.preset().replace("CONFIG_KVM_AMD=y", "").replace("CONFIG_KSM=y", "# CONFIG_KSM is not set")
    essential, others = kconfig.not_taken(config)
    assert (essential, others) == (["KVM_AMD"], ["KSM"])


def test_job_strings() -> None:
    from lablib.initrd import Job
    from lablib.words import Failure

    job = Job(["echo", "a=b", "ü\udcff"], "/x y", {"B": "2", "A": "1=1"}, (24, 80))
    assert job.encode() == b"arg=echo\0arg=a=b\0arg=\xc3\xbc\xff\0env=A=1=1\0env=B=2\0cwd=/x y\0tty=24 80\0"
    for bad in (Job([]), Job(["a\0b"]), Job(["x" * (1 << 20)])):
        with pytest.raises(Failure):
            bad.encode()


def test_archive_is_cpio(tmp_path: Path) -> None:
    from lablib.initrd import Job, archive

    init = tmp_path / "init"
    init.write_bytes(b"#!odd")
    data = archive(init, Job(["true"]))
    found: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        fields = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        assert data[at : at + 6] == b"070701"
        name = data[at + 110 : at + 109 + fields[11]].decode()
        at += (110 + fields[11] + 3) & ~3
        if name == "TRAILER!!!":
            break
        found[name] = (fields[1], data[at : at + fields[6]])
        at += (fields[6] + 3) & ~3
    assert at == len(data)
    assert found["init"] == (0o100755, b"#!odd")
    assert found["job"][1] == b"arg=true\0cwd=/\0"
    assert found["dev/console"][0] == 0o020600


def test_machine_command() -> None:
    from lablib.machine import PORTS, Machine

    fds = dict(zip(PORTS, (10, 11, 12, 13), strict=True))
    command = Machine(Path("/k"), Path("/i"), cpus=3, memory="1G").command(Path("/a"), Path("/c"), fds)
    assert command[command.index("-smp") + 1] == "3"
    assert "socket,id=err,fd=12" in command
    assert any(word.startswith("local,path=/,") and "readonly=on" in word for word in command)


@pytest.mark.parametrize("place", ["/dev/shm/tree", "/run/user/0/tree"])
def test_tree_that_the_guest_would_not_see(place: str) -> None:
    from lablib.machine import checked_environment
    from lablib.words import Failure

    with pytest.raises(Failure, match=place):
        checked_environment(Path(place), Path("/usr/bin/python3"))


# -- the command ---------------------------------------------------------------------------------------------------------------------------


def lab_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    from lablib import main

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["lab", *arguments])
    try:
        return main.main()
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["dance"], ["run"], ["run", "--"], ["run", "--timeout", "-3", "true"], ["run", "--cpus", "9", "true"],
        ["run", "--memory", "1M", "true"], ["run", "--memory", "lots", "true"], ["selftests", "--limit", "none"],
        ["status", "extra"], ["--timeout", "0", "test"],
    ],
)  # fmt: skip
def test_usage_errors(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as stop:
        lab_main(monkeypatch, *arguments)
    assert stop.value.code == 2


def test_arguments_of_others_stay_theirs() -> None:
    from lablib.main import parse

    options = parse(["--timeout", "60", "--cpus=1", "test", "-k", "x and y", "--memory", "--", "z"])
    assert (options.command, options.timeout, options.cpus, options.memory) == ("test", 60, 1, "4G")
    assert options.arguments == ["-k", "x and y", "--memory", "--", "z"]
    options = parse(["run", "--timeout", "5", "--", "ls", "-l", "--", "x"])
    assert (options.words, options.timeout) == (["ls", "-l", "--", "x"], 5)
    assert parse(["run", "ls", "-l"]).words == ["ls", "-l"]


@pytest.mark.parametrize("arguments", [["run", "true"], ["test", "-q"], ["selftests", "vm_types_test"]])
def test_without_setup_each_command_says_so(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lab_main(monkeypatch, *arguments) == 69
    assert "scripts/lab setup" in capsys.readouterr().err


def played_cache() -> None:
    """A cache in which source, kernel and first process look done."""
    from lablib import initrd, kernel, source
    from lablib.cache import write_json

    for step, result in (
        (source.resolve_step(), resolved()), (kernel.kernel_step(resolved()), {"image_bytes": 1}), (initrd.init_step(), {"bytes": 1}),
    ):  # fmt: skip
        step.directory.mkdir(parents=True)
        write_json(step.directory / "complete.json", {"result": result})


def test_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lab: Path) -> None:
    from lablib import packages

    monkeypatch.setattr(packages, "missing", lambda *_: [])
    assert lab_main(monkeypatch, "status", "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["ready"]
    assert "scripts/lab setup" in report["reason"]
    assert not lab.exists(), "looking makes nothing"

    played_cache()
    assert lab_main(monkeypatch, "status", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    states = {part["name"]: part["state"] for part in report["parts"]}
    assert (states.pop("source"), states.pop("selftests")) == ("unneeded", "missing")
    assert states == {"packages": "ready", "resolve": "ready", "kernel": "ready", "init": "ready"}
    assert (report["ready"], report["reason"]) == (True, None)

    monkeypatch.setattr(packages, "missing", lambda *purposes: ["qemu-system-x86"] if "run" in purposes else [])
    assert lab_main(monkeypatch, "status") == 1
    out = capsys.readouterr().out
    assert "lacks qemu-system-x86" in out
    assert out.splitlines()[-1].startswith("the lab is not ready: packages")


def test_status_of_an_interrupted_build(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from lablib import kernel, packages

    monkeypatch.setattr(packages, "missing", lambda *_: [])
    played_cache()
    step = kernel.kernel_step(resolved())
    (step.directory / "complete.json").rename(step.directory / "log")
    assert lab_main(monkeypatch, "status") == 1
    assert "kernel     partial" in capsys.readouterr().out


def test_clean(monkeypatch: pytest.MonkeyPatch, lab: Path) -> None:
    played_cache()
    for name in ("source-0/tree/x", "kernel-0/build/x"):
        (lab / name).mkdir(parents=True)
    kept = {path.name for path in lab.iterdir() if (path / "complete.json").exists()}
    assert lab_main(monkeypatch, "clean", "--source") == 0
    assert (lab / "source-0").is_dir()
    assert not (lab / "source-0/tree").exists()
    assert not (lab / "kernel-0/build").exists()
    assert lab_main(monkeypatch, "clean", "--old") == 0
    assert {path.name for path in lab.iterdir()} == kept
    assert lab_main(monkeypatch, "clean") == 0
    assert not lab.exists()


# -- selftests ----------------------------------------------------------------------------------------------------------------------------


def test_choose() -> None:
    from lablib.selftests import choose
    from lablib.words import Failure

    names = ["vm_types_test", "x86/private_mem_a", "x86/private_mem_b", "x86/smm_test"]
    assert choose(names, []) == names
    assert choose(names, ["smm_test", "x86/private*"]) == names[1:]
    assert choose(names, ["vm_types_test", "vm_*"]) == names[:1]
    with pytest.raises(Failure, match="no selftest matches vmx"):
        choose(names, ["vm_*", "vmx"])


def test_table_takes_lines_in_any_pieces() -> None:
    from lablib.selftests import Table

    lines = [
        '{"start": "vm_types_test"}', '{"test": "vm_types_test", "verdict": "pass", "seconds": 0.1, "reason": ""}', "noise", "[1]", "null",
        '{"start": "x86/msrs_test"}', '{"test": "x86/msrs_test", "verdict": "fail", "seconds": 1, "reason": "status 254: w"}',
        '{"start": "x86/smm_test"}', '{"test": "x86/smm_test", "verdict": "hang", "seconds": 9.0}', '{"start": "z"}', '{"half',
    ]  # fmt: skip
    data = "\n".join(lines).encode()
    for size in (1, 7, len(data)):
        table = Table()
        for at in range(0, len(data), size):
            table.take(data[at : at + size])
        assert [row.test for row in table.rows] == ["vm_types_test", "x86/msrs_test", "x86/smm_test"]
        assert [row.verdict for row in table.rows] == ["pass", "fail", "hang"]
        assert table.running == "z"
        assert [row.bad for row in table.rows] == [False, False, True]
        assert table.summary() == "1 pass, 1 fail, 1 hang; 1 that TCG cannot pass"
        assert table.as_json()[1]["limit"]


def test_a_machine_that_ends_takes_one_test_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from lablib import machine, selftests
    from lablib.words import Failure

    boots: list[list[str]] = []

    def run(box: object, job: Any, streams: Any, timeout: float) -> int:
        names = job.command[5:]
        boots.append(names)
        for name in names:
            streams.out(json.dumps({"start": name}).encode() + b"\n")
            if name == "panics":
                streams.out(b'{"test": "pan')
                raise Failure("the lab's machine ended before the job did\n  Kernel panic")
            streams.out(json.dumps({"test": name, "verdict": "hang" if name == "hangs" else "pass", "seconds": 1}).encode() + b"\n")
            if name == "hangs":
                return 0
        return 0

    monkeypatch.setattr(machine, "run", run)
    table = selftests.Table()
    box = machine.Machine(Path("k"), Path("i"))
    selftests.run(box, Path("/f"), ["a", "panics", "b", "hangs", "c"], 5, table, Path("/usr/bin/python3"))
    assert boots == [["a", "panics", "b", "hangs", "c"], ["b", "hangs", "c"], ["c"]]
    assert [row.test for row in table.rows] == ["a", "panics", "b", "hangs", "c"]
    assert [row.verdict for row in table.rows] == ["pass", "crash", "pass", "hang", "pass"]
    assert "Kernel panic" in table.rows[1].reason
    assert selftests.status_of(table) == 1


def test_reasons() -> None:
    from lablib.inside_selftests import reason_of

    failed = "Random seed: 1\n==== Test Assertion Failure ====\n  x.c:7: a == b\n  pid=1 tid=1 errno=4\n     1\t0x0000: main\n  2 != 3\n"
    assert reason_of("fail", failed) == "x.c:7: a == b | 2 != 3"
    assert reason_of("skip", "Random seed: 0x1\n1..0 # SKIP - Requirement not met: has_svm\n") == "Requirement not met: has_svm"
    assert reason_of("pass", "ok 1 a\nok 2 b\n") == "2 ok"


def test_runner_kills_the_whole_session(tmp_path: Path) -> None:
    """A test over its limit ends with its children, also with those in groups of their own."""
    from lablib import inside_selftests

    script = tmp_path / "stubborn"
    script.write_text('#!/bin/bash\nset -m\nsleep 300 &\necho $! >"$0.pid"\nwait\n')
    script.chmod(0o755)
    inside_selftests.WORK_FOLDER = str(tmp_path)
    record = inside_selftests.run_one(tmp_path, "stubborn", 1.0)
    assert record["verdict"] == "hang"
    child = int((tmp_path / "stubborn.pid").read_text())
    deadline = time.monotonic() + 5
    while Path(f"/proc/{child}").exists() and state(child) != "Z":
        assert time.monotonic() < deadline, "the child outlives its session"
        time.sleep(0.01)


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


# -- the real thing -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def real_lab(tree: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command's words; skips where the lab is not set up."""
    monkeypatch.undo()
    command = [str(tree / "scripts" / "lab")]
    if os.environ.get("SEVMM_IN_LAB"):
        pytest.skip("needs the lab: this is its inside")
    status = subprocess.run([*command, "status", "--json"], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if status.returncode != 0:
        reason = json.loads(status.stdout)["reason"] if status.stdout.startswith("{") else status.stderr.strip()
        pytest.skip(f"needs the lab: {reason}")
    return command


@pytest.mark.lab
@pytest.mark.slow
def test_lab_runs_a_command(real_lab: list[str], tree: Path) -> None:
    """Streams, status, /dev/kvm with SW_PROTECTED VMs, the tree; and nothing stays behind."""
    program = """
import fcntl, os, sys
word = sys.stdin.read()
kvm = os.open("/dev/kvm", os.O_RDWR)
types = fcntl.ioctl(kvm, 0xAE03, 235)  # KVM_CHECK_EXTENSION, KVM_CAP_VM_TYPES
open("pyproject.toml", "w").close()
print(word, types & 2, os.path.getsize("pyproject.toml"), os.environ["SEVMM_IN_LAB"])
print("words on stderr", file=sys.stderr)
sys.exit(7)
"""
    size = (tree / "pyproject.toml").stat().st_size
    command = [*real_lab, "run", "--timeout", "60", "--", "python3", "-c", program]
    done = subprocess.run(command, input="hello", capture_output=True, text=True, cwd=tree, check=False)
    assert (done.returncode, done.stdout) == (7, "hello 2 0 1\n"), done.stderr
    assert "words on stderr" in done.stderr
    assert (tree / "pyproject.toml").stat().st_size == size
    timed = subprocess.run([*real_lab, "run", "--timeout", "0.5", "--", "sleep", "60"], capture_output=True, text=True, check=False)
    assert timed.returncode == 124, timed.stderr
