"""scripts/bench: the JSON has its keys, a miss is exit status 1, and its hand-made guests are and do what they should.

Whether a target is met is for scripts/bench to say, on a quiet machine; here it is that each measurement measures, and
that it fails when the guest does not do what is measured.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

KEYS = ["name", "value", "unit", "target", "ok", "detail", "skipped"]
ENTRIES = {"exit_loop_vs_c", "model_out_us", "model_map_gpa_us", "hello_s", "gpamap_flips"}
ENTRIES |= {
    "alu_vs_tcg",
    "alu_vs_engine",
    "memory_vs_tcg",
    "memory_vs_engine",
    "tlb_fill_us",
    "fault_restart_us",
    "atomics_4_vcpus",
    "kick_p99_ms",
    "launch_vs_openssl",
    "page_crypt_us",
    "conversions_4k",
    "conversions_2m",
    "conversions_implicit",
    "selftest_s",
}


@pytest.fixture
def bench(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchlib.main, with an argument list to run it by."""
    monkeypatch.syspath_prepend(str(tree / "scripts"))
    from benchlib import main

    def run(*argv: str) -> int:
        monkeypatch.setattr(sys, "argv", ["bench", *argv])
        return main.main()

    return run


def test_list(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--list") == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} >= ENTRIES


def test_unknown_entry(bench: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        bench("--only", "luck")
    assert stop.value.code == 2


@pytest.mark.parametrize(("value", "status"), [(1.0, 0), (3.0, 1)])
def test_json_and_status(
    bench: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, value: float, status: int
) -> None:
    from benchlib.entry import ENTRIES as registry
    from benchlib.entry import Entry, Measured, Skipped

    def skip() -> Measured:
        raise Skipped("needs luck: none here; get it: wait")

    def explode() -> Measured:
        raise ZeroDivisionError("no trips")

    bench("--list")  # registers the real ones
    capsys.readouterr()
    monkeypatch.setitem(registry, "played", Entry("played", "us", 2, "", lambda: Measured(value)))
    monkeypatch.setitem(registry, "skipped", Entry("skipped", "us", 2, "", skip))
    assert bench("--only", "played", "--only", "skipped") == status
    out, err = capsys.readouterr()
    played, skipped = json.loads(out)["entries"]
    monkeypatch.setitem(registry, "broken", Entry("broken", "us", 2, "", explode))
    assert bench("--only", "broken") == 1
    assert "no trips" in json.loads(capsys.readouterr().out)["entries"][0]["detail"]["error"]
    assert list(played) == list(skipped) == KEYS
    assert (played["value"], played["ok"], played["skipped"]) == (value, status == 0, None)
    assert (skipped["value"], skipped["ok"]) == (None, None)
    assert "get it" in skipped["skipped"]
    assert ("MISSED" in err) == bool(status)


@pytest.mark.slow
def test_gpamap_flips_runs(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """It measures; whether the target is met is for scripts/bench to say, on a quiet machine."""
    bench("--only", "gpamap_flips")
    entry = json.loads(capsys.readouterr().out)["entries"][0]
    assert entry["value"] > 0
    assert entry["detail"]["mib"] < 3


def test_guests_are_elf_files(bench: Any, tmp_path: Path) -> None:
    from benchlib import tiny
    from elftools.elf.elffile import ELFFile

    code = tiny.map_loop(7)
    with tiny.write_elf(tmp_path / "g.elf", code).open("rb") as file:
        elf = ELFFile(file)
        segment = next(elf.iter_segments())
        assert (elf.header.e_machine, elf.header.e_entry) == ("EM_X86_64", 0x100000)
        assert segment.header.p_vaddr == segment.header.p_paddr == 0x100000
        assert segment.data() == code


@pytest.mark.parametrize(("value", "good"), [(0.4, False), (0.5, True), (0.6, True)])
def test_a_target_that_is_the_least(bench: Any, value: float, good: bool) -> None:
    from benchlib.entry import Entry, Measured

    entry = Entry("speed", "speed", 0.5, "", lambda: Measured(value), at_least=True)
    assert (entry.run()["ok"], entry.bound) == (good, ">=")


@pytest.mark.model
@pytest.mark.parametrize(("type", "private"), [("plain", False), ("sw-protected", False), ("sw-protected", True), ("sev", False)])
def test_loops_end_with_the_right_values(bench: Any, model_host: Any, type: str, private: bool) -> None:
    """Each loop in each kind of guest: registers where they must be, and memory where the VMM can see it."""
    from benchlib import loops
    from benchlib.bare import DATA, PAGE, BareGuest

    def run(code: bytes) -> tuple[Any, list[int]]:
        with BareGuest(code + loops.HLT, type=type, private=private) as guest:
            guest.put(DATA, bytes(8))
            return guest.run_to_halt(guest.vcpus[0]), [guest.word(DATA + at) for at in (0, 8, PAGE, 2 * PAGE)]

    seen = type != "sev" and not private
    assert run(loops.alu(10))[0].rax == loops.alu_result(10) == 55
    regs, _ = run(loops.memory(2, DATA))
    assert (regs.rdi, regs.rcx, regs.rdx) == (DATA + 8 * loops.MEMORY_WORDS, 0, 0)
    regs, _ = run(loops.touch(3, DATA, 5, PAGE, store=True))
    assert (regs.rdi, regs.rdx) == (DATA + 5 * PAGE, 0)
    regs, words = run(loops.count_each(DATA, 2, PAGE))
    assert regs.rdi == DATA + 2 * PAGE
    assert not seen or words == [1, 0, 1, 0]
    _, words = run(loops.atomics(7, DATA))
    assert not seen or words[0] == 14


@pytest.mark.model
def test_a_guest_that_does_not_end_in_hlt(bench: Any, model_host: Any) -> None:
    from benchlib.bare import BareGuest, GuestFailed

    with BareGuest(bytes.fromhex("e610")) as guest, pytest.raises(GuestFailed, match="instead of HLT"):  # out 0x10, al
        guest.run_to_halt(guest.vcpus[0])


@pytest.mark.model
@pytest.mark.parametrize("name", ["alu_vs_engine", "memory_vs_engine", "tlb_fill_us", "fault_restart_us", "atomics_4_vcpus", "kick_p99_ms"])
def test_entries_measure(bench: Any, model_host: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """With a few rounds only."""
    from benchlib import loops, misses, speed, threads
    from benchlib.entry import ENTRIES as registry

    bench("--list")
    for module, attribute, few in (
        (speed, "ROUNDS", 1), (misses, "ROUNDS", 1), (misses, "PAGES", 600), (misses, "PASSES", 1), (misses, "FAULTS", 20),
        (misses, "FAULT_ROUNDS", 1), (threads, "ATOMIC_ROUNDS", 40_000), (threads, "KICKS", 10),
    ):  # fmt: skip
        monkeypatch.setattr(module, attribute, few)
    monkeypatch.setattr(speed, "_measured", {})
    monkeypatch.setattr(speed, "ALU", speed.Loop(lambda data: loops.alu(10_000), 40_000, loops.alu_result(10_000)))
    monkeypatch.setattr(speed, "MEMORY", speed.Loop(lambda data: loops.memory(2, data), 2 * 6 * 8192))
    result = registry[name].run()
    assert "error" not in result["detail"], result
    assert result["value"] > 0


@pytest.mark.model
def test_measurements_notice_a_wrong_guest(bench: Any, model_host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchlib import loops, misses, speed, threads
    from benchlib.bare import DATA, PAGE, BareGuest, GuestFailed

    monkeypatch.setattr(threads, "ATOMIC_ROUNDS", 100)
    with BareGuest(loops.atomics(99, DATA) + loops.HLT) as guest, pytest.raises(GuestFailed, match="2 of 200"):
        threads._together(guest)
    monkeypatch.setattr(misses, "FAULTS", 4)
    with BareGuest(loops.count_each(DATA, 3, PAGE) + loops.HLT, type="sw-protected") as guest, pytest.raises(GuestFailed, match="3 faults"):
        misses._fault_cycle(guest)
    with BareGuest(loops.alu(9) + loops.HLT) as guest, pytest.raises(GuestFailed, match="RAX"):
        speed._model(guest, speed.Loop(lambda data: b"", 40, loops.alu_result(10)))
    with BareGuest(loops.HLT) as guest:
        spinner = threads._Spinner(guest.vcpus[0])
        spinner.thread.join(threads.LOST)  # a kick before KVM_RUN would be answered with EINTR, rightly
        with pytest.raises(GuestFailed, match="instead of EINTR"):
            spinner.kick()
        spinner.end()


def test_without_qemu(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entries that compare with it are skipped, with the remedy."""
    from benchlib.entry import ENTRIES as registry

    bench("--list")
    monkeypatch.setenv("PATH", "")
    for name in ("alu_vs_tcg", "memory_vs_tcg"):
        result = registry[name].run()
        assert (result["value"], result["ok"]) == (None, None)
        assert "apt install qemu-system-x86" in result["skipped"]


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="needs qemu-system-x86_64; get it: apt install qemu-system-x86")
def test_tcg_runs_the_loop(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred times as many rounds take longer, and a loop that never comes to its end is an error with a time limit."""
    from benchlib import loops, tcg
    from benchlib.bare import GuestFailed

    with tcg.Tcg(loops.alu(1_000_000)) as few, tcg.Tcg(loops.alu(100_000_000)) as many:
        assert 10 * few.seconds() < many.seconds()
    with tcg.Tcg(loops.memory(1, tcg.DATA)) as memory:
        assert memory.seconds() > 0
    monkeypatch.setattr(tcg, "TIMEOUT", 0.5)
    with tcg.Tcg(loops.spin(tcg.DATA)) as forever, pytest.raises(GuestFailed, match="did not reach b'b'"):
        forever.seconds()
