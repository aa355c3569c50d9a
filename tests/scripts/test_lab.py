"""scripts/lab without its machine: keys, steps that resume, the source, options of the kernel, the archive it starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.scripts.conftest import resolved

pytestmark = pytest.mark.usefixtures("lab")


MADISON = """
linux-source-6.1 | 6.1.192-2 | http://mirror.invalid/debian oldstable/main amd64 Packages
linux-source-7.2 | 7.2.13-1 | http://mirror.invalid/debian unstable/main amd64 Packages
linux-source-7.10 | 7.10~rc2-1 | http://mirror.invalid/debian experimental/main amd64 Packages
linux-source-7.3 | 7.3.4-1~bpo13+1 | http://mirror.invalid/debian stable-backports/main amd64 Packages
linux-source-7.3 | 7.3.2-1~bpo13+1 | http://mirror.invalid/debian stable-backports/main amd64 Packages
"""


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
