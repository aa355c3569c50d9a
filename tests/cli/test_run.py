"""`sevmm run` around a run_guest that is played: options arrive, console and JSON go where they belong, the status is the report's."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vmm.run
from vmm import cli
from vmm.conversion import Conversion
from vmm.gpamap import MappedRange
from vmm.report import LaunchReport, RunReport
from vmm.run import GuestRequest

KEYS = [
    "guest", "type", "dialect", "rung", "rung_reason", "result", "exit_code", "console", "exits", "conversions", "map", "launch",
    "elapsed_s",
]  # fmt: skip

Play = Callable[..., list[GuestRequest]]


def report(**changes: Any) -> RunReport:
    values: dict[str, Any] = {
        "guest": "private-memory", "type": "sev", "rung": "model", "rung_reason": "the kernel has no VM type sev", "result": "pass",
        "exit_code": 0, "console": "hello\n", "exits": {"IO": 12, "HYPERCALL": 2}, "elapsed_s": 0.125,
        "conversions": [
            Conversion(gpa=0x800000, size=4096, to="shared", cause="explicit", vcpu=0),
            Conversion(gpa=0x800000, size=4096, to="private", cause="explicit", vcpu=0),
        ],
        "map": [MappedRange(0, 0x5000, "private", 0), MappedRange(0x5000, 0x1000, "shared", 0)],
        "launch": LaunchReport(3, b"\x11" * 32, b"\x22" * 32, b"\x33" * 16, b"\x22" * 32, True),
    }  # fmt: skip
    return RunReport(**{**values, **changes})


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Put an answer in run_guest's place; the list fills with the requests that arrive."""

    def install(answer: RunReport | BaseException, console: bytes = b"") -> list[GuestRequest]:
        seen: list[GuestRequest] = []

        def run_guest(request: GuestRequest) -> RunReport:
            seen.append(request)
            if console and request.console is not None:
                request.console(console)
            if isinstance(answer, BaseException):
                raise answer
            return answer

        monkeypatch.setattr(vmm.run, "run_guest", run_guest)
        return seen

    return install


def test_options_arrive(play: Play) -> None:
    seen = play(report())
    options = "--type sev --on model --memory 128M --vcpus 3 --policy 0x5 --timeout 2.5 --arguments pages=4 --json"
    cli.main(["run", "./g.elf", *options.split()])
    request = seen[0]
    assert (request.guest, request.type, request.on, request.dialect) == ("./g.elf", "sev", "model", "mainline")
    assert (request.memory, request.vcpus, request.policy, request.timeout) == (128 << 20, 3, 5, 2.5)
    assert (request.arguments, request.console) == ("pages=4", None)


def test_append_is_another_name_for_arguments(play: Play) -> None:
    seen = play(report())
    cli.main(["run", "./memtest86+x64.bin", "--append", "console=ttyS0,115200 nosmp"])
    assert seen[0].arguments == "console=ttyS0,115200 nosmp"


def test_defaults_leave_the_choice_to_the_catalogue(play: Play) -> None:
    seen = play(report())
    cli.main(["run", "hello", "--timeout", "0"])
    assert (seen[0].type, seen[0].on, seen[0].policy, seen[0].timeout, seen[0].memory) == (None, "auto", None, None, 64 << 20)


def test_json_is_one_object_with_the_keys_of_the_contract(play: Play, capfd: pytest.CaptureFixture[str]) -> None:
    play(report(notes=["a note"]), console=b"never printed")
    assert cli.main(["run", "private-memory", "--json"]) == 0
    out, err = capfd.readouterr()
    data = json.loads(out)
    assert list(data) == KEYS
    assert out.count("\n") == 1
    assert data["launch"]["match"] is True
    assert data["conversions"][0] == {"gpa": 0x800000, "size": 4096, "to": "shared", "cause": "explicit", "vcpu": 0}
    assert data["map"][1] == {"gpa": 0x5000, "size": 4096, "state": "shared", "slot": 0}
    assert err == "sevmm: note: a note\n"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"result": "fail", "exit_code": 37}, 37),
        ({"result": "unsupported", "exit_code": None, "message": "this host cannot", "remedy": "--on model"}, 4),
        ({"result": "timeout", "exit_code": None, "message": "no end after 5 s"}, 124),
        ({"result": "error", "exit_code": None, "message": "the guest image is empty"}, 70),
        ({"result": "error", "exit_code": None, "message": "the option is for SEV", "usage": True}, 2),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_exit_status(play: Play, capfd: pytest.CaptureFixture[str], changes: dict[str, Any], code: int, flags: list[str]) -> None:
    play(report(**changes))
    assert cli.main(["run", "private-memory", *flags]) == code
    err = capfd.readouterr().err
    assert err.count("\n") == bool(changes.get("message"))
    assert changes.get("message", "") in err
    assert changes.get("remedy", "") in err


def test_nothing_ran_no_summary(play: Play, capfd: pytest.CaptureFixture[str]) -> None:
    play(report(rung=None, result="unsupported", exit_code=None, message="no rung offers sev-es"))
    assert cli.main(["run", "private-memory"]) == 4
    out, err = capfd.readouterr()
    assert out == ""
    assert "no rung offers sev-es" in err


def test_summary(play: Play, capfd: pytest.CaptureFixture[str]) -> None:
    play(report(), console=b"from the guest")
    assert cli.main(["run", "private-memory"]) == 0
    out = capfd.readouterr().out
    assert out.startswith("from the guest\n\n")
    assert "\x1b" not in out
    for words in (
        "model: the kernel has no VM type sev", "IO 12, HYPERCALL 2", "1 explicit to private (4 KiB)", "1 explicit to shared (4 KiB)",
        "[0x5000, 0x6000)", "no debugging, no key sharing", "22" * 32, "match", "pass, exit code 0, 0.125 s",
    ):  # fmt: skip
        assert words in out


def test_mismatch_is_loud(play: Play, capfd: pytest.CaptureFixture[str]) -> None:
    play(report(launch=LaunchReport(1, b"\1" * 32, b"\2" * 32, b"\3" * 16, b"\4" * 32, False)))
    cli.main(["run", "private-memory"])
    assert "DOES NOT MATCH" in capfd.readouterr().out


def test_long_map_is_cut(play: Play, capfd: pytest.CaptureFixture[str]) -> None:
    ranges = [MappedRange(page * 4096, 4096, "private" if page % 2 else "shared", 0) for page in range(1000)]
    play(report(map=ranges))
    cli.main(["run", "private-memory"])
    out = capfd.readouterr().out
    assert "and 988 more ranges" in out
    assert out.count("\n") < 40


def test_interrupt_closes_the_line(play: Play, capfd: pytest.CaptureFixture[str]) -> None:
    play(KeyboardInterrupt(), console=b"half a li")
    assert cli.main(["run", "spin"]) == 130
    out, err = capfd.readouterr()
    assert out == "half a li\n"
    assert err == "sevmm: interrupted\n"


# -- secrets, saved launches, progress ----------------------------------------------------------------------------------------------------


def test_a_secret_arrives_and_is_wiped_afterwards(play: Play, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"\0the key\n")
    arrived: list[bytes] = []
    seen = play(report())
    real = vmm.run.run_guest

    def look(request: GuestRequest) -> RunReport:
        arrived.append(bytes(request.secret or b""))
        return real(request)

    vmm.run.run_guest = look  # play's monkeypatch takes it back
    assert cli.main(["run", "secret", "--secret", str(tmp_path / "key"), "--save-launch", "l.json"]) == 0
    assert arrived == [b"\0the key\n"], "every byte, the newline too"
    assert seen[0].secret == bytes(9)
    assert seen[0].save_launch == "l.json"


def test_a_secret_from_stdin(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmm.cli.run import read_secret

    reader, writer = os.pipe()
    os.write(writer, b"piped")
    os.close(writer)
    saved = os.dup(0)
    os.dup2(reader, 0)
    try:
        assert read_secret("-") == b"piped"
        os.fstat(0)  # still open: it was not ours to close
    finally:
        os.dup2(saved, 0)
        os.close(saved)
        os.close(reader)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty: one page holds 1 to 4080 bytes"),
        (b"horse" * 1000, "has more than 4080 bytes"),
        (None, "cannot be read: no such file"),
    ],
)
def test_what_cannot_be_a_secret(play: Play, tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes | None, words: str) -> None:
    seen = play(report())
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    assert cli.main(["run", "secret", "--secret", str(path)]) == 2
    out, err = capfd.readouterr()
    assert (seen, out) == ([], "")
    assert err.startswith(f"sevmm: the secret {path} {words}") and err.count("\n") == 1
    assert "horse" not in err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("total", "terminal", "shown"), [(64 << 20, True, True), (64 << 20, False, False), (16 << 20, True, False)])
def test_progress_is_for_large_launches_on_a_terminal(monkeypatch: pytest.MonkeyPatch, total: int, terminal: bool, shown: bool) -> None:
    from vmm.cli.run import LaunchProgress

    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    progress = LaunchProgress()
    progress(total // 2, total)
    progress.finish()
    progress.finish()
    text = stream.getvalue()
    assert ("measuring and encrypting" in text) == shown
    assert not shown or text.endswith("\x1b[?25h") or "\x1b[2K" in text, "the line is taken away"


def test_progress_ends_with_an_interrupted_launch(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[bool] = []
    monkeypatch.setattr("vmm.cli.run.LaunchProgress.finish", lambda self: ended.append(True))
    play(KeyboardInterrupt())
    assert cli.main(["run", "spin"]) == 130
    assert ended
