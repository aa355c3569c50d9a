"""Programs on a plain VM see the same under `sevmm exec` as on the real /dev/kvm: programs/*.c hold what that is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.exec.conftest import Build
from tests.exec.launching import Under

pytestmark = [pytest.mark.gcc, pytest.mark.model]

PLAIN = [
    "plain", "threads", "signals", "fds", "fork", "fork exec", "rights", "races", "events", "maps", "wild", "paths", "gmem",
    "nodes", "forks", "across", "shapes", "shapes used", "shapes apart",
]  # fmt: skip
OTHER_FILES = [
    *(f"{what}: {call}" for what in ("kvm", "a VM", "a vCPU") for call in ("read", "write", "ftruncate", "fsync", "link")),
    "kvm: fstat",
    "a VM: private map",
    "a VM: used by a vforked child, whose memory is ours",
    "a guest_memfd under a low number: read",
    "a guest_memfd under a low number: pwrite",
]
"""Facts of asfile.c that differ, because memfds stand for the fds: docs/fidelity.md has the rows."""
BACKINGS = ["private", "shared", "memfd", "memfd-closed", "file", "file-closed", "file-private", "hugetlb", "hugetlb-memfd"]


def judge(done: subprocess.CompletedProcess[str]) -> None:
    """All facts as wanted; 77: this machine has not what it is about."""
    if done.returncode == 77:
        pytest.skip(done.stdout.strip().splitlines()[-1])
    wrong = [line for line in done.stdout.splitlines() if "WRONG" in line]
    assert not wrong, "\n".join(wrong)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout[-1000:] + done.stderr
    assert "wrong: 0" in done.stdout


@pytest.mark.parametrize("words", PLAIN)
def test_a_program(build: Build, side: Under, words: str, tmp_path: Path) -> None:
    name, *arguments = words.split()
    judge(side.run(build(name), *arguments, cwd=tmp_path))


@pytest.mark.parametrize("backing", BACKINGS)
def test_guest_memory(build: Build, side: Under, backing: str, tmp_path: Path) -> None:
    judge(side.run(build("ram"), backing, cwd=tmp_path))


def test_fds_as_files(build: Build, side: Under) -> None:
    """What an fd answers besides ioctls and mmap: natively all is as asfile.c says, under us all but a known list, and no harm is done."""
    done = side.run(build("asfile"))
    wrong = [line.split("  WRONG")[0].rpartition(": ")[0] for line in done.stdout.splitlines() if "WRONG" in line]
    assert wrong == ([] if side.name == "native" else [fact for fact in wrong if fact in OTHER_FILES]), done.stdout
    assert "after all that it runs: 2\n" in done.stdout


def test_calls_of_32_bits(build: Build, side: Under) -> None:
    """int 0x80 and x32 numbers: no way around us, and the user is told."""
    done = side.run(build("old"))
    assert done.returncode == 0, done.stdout
    assert done.stderr.count("\n") == (side.name == "exec") and ("32-bit" in done.stderr) == (side.name == "exec"), done.stderr


@pytest.mark.parametrize("name", ["plain", "fork"])
def test_a_static_program(build: Build, under: Under, name: str) -> None:
    judge(under.run(build(name, "-static")))


def test_parameters_of_the_real_modules(build: Build) -> None:
    """The program that reads them is right about the kernel's own files."""
    here = [path for path in Path("/sys/module/kvm/parameters").glob("*") if path.name in ("enable_pmu", "ignore_msrs", "mmio_caching")]
    if not here:
        pytest.skip("needs the kvm module's parameters in /sys; get it: a host with KVM")
    judge(Under("native").run(build("modules"), *(f"kvm/parameters/{path.name}={path.read_text().strip()}" for path in here)))


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ((), ["kvm/parameters/force_emulation_prefix=0", "kvm_amd/parameters/sev=Y", "kvm_amd/parameters/sev_es=Y"]),
        (("--platform", "sev"), ["kvm_amd/parameters/sev=Y", "kvm_amd/parameters/sev_es=N"]),
        (("--platform", "none"), ["kvm_amd/parameters/sev=N", "kvm_amd/parameters/sev_es=N"]),
    ],
    ids=["sev-es", "sev", "none"],
)
def test_parameters_that_the_model_has(build: Build, options: tuple[str, ...], facts: list[str]) -> None:
    judge(Under("exec", options).run(build("modules"), *facts))


def test_an_owner_launches_a_guest(build: Build, under: Under) -> None:
    judge(under.run(build("sev")))


def test_an_asid_is_free_when_the_last_fd_and_map_are_gone(build: Build) -> None:
    judge(Under("exec", ("--platform", "sev,asids=1")).run(build("sev"), "asids"))


def test_the_node_of_sev(build: Build, under: Under) -> None:
    judge(under.run(build("nodes"), "/dev/sev"))


def test_a_user_without_rights(build: Build, anyone: tuple[str, ...]) -> None:
    for words in (["plain"], ["ram", "private"], ["sev"], ["nodes"]):
        judge(Under("exec", before=anyone).run(build(words[0]), *words[1:], cwd=Path("/")))


@pytest.mark.parametrize("hidden", ["nothing there", "a node that does not open"])
def test_a_machine_without_kvm(build: Build, hidden: str) -> None:
    """In a mount namespace where /dev is another directory, or /dev/kvm is some other file."""
    how = {
        "nothing there": (
            "mkdir -p $D && mount -t tmpfs none $D && for n in null zero urandom tty; do touch $D/$n && mount --bind /dev/$n $D/$n; done"
            " && mount --move $D /dev"
        ),
        "a node that does not open": "touch $D.file && mount --bind $D.file /dev/kvm",
    }[hidden]
    script = f'D={build("plain").parent}/dev; {how} && exec "$@"'
    before = ("unshare", "--mount", "sh", "-c", script, "sh")
    probe = subprocess.run([*before, "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"needs root, to hide /dev/kvm in a mount namespace: {probe.stderr.strip()}; get it: run as root where it is")
    for words in (["plain"], ["nodes"], ["nodes", "/dev/sev"], ["sev"]):
        judge(Under("exec", before=before).run(build(words[0]), *words[1:]))
