"""The recording: whole JSON lines in order, a header and an end, a limit that holds, a disk that fills up, many threads."""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmapi import table
from kvmapi.abi import ioctls, kvm, structs
from kvmapi.abi.run import kvm_run
from kvmapi.model.caller import OwnMemory
from vmm.exec.options import CannotRecord, ExecOptions, machine
from vmm.exec.record import LEAST_LIMIT, CallRecord, Recorder


class File:
    """A file of the model."""


VM, VCPU = File(), File()
OPTIONS = ExecOptions(("./vmm", "-m", "1G"), machine("sev,asids=9"))


class NoMemory:
    def read(self, address: int, size: int) -> bytes:
        raise AssertionError("nothing is to be read")


def lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def me(call: str = "close", **more: Any) -> CallRecord:
    return CallRecord(os.getpid(), threading.get_native_id(), call, "vm", 4711, **more)


def test_whole_story(tmp_path: Path) -> None:
    import ctypes

    path = tmp_path / "log"
    recorder = Recorder(path, OPTIONS)
    recorder.call(me("openat", fields={"path": "/dev/kvm"}, result=5))
    region = structs.kvm_userspace_memory_region(1, 0, 0x1000, 0x800, 0)
    at = ctypes.addressof(region)
    entry = recorder.ioctl(os.getpid(), os.getpid(), "vm", VM, ioctls.KVM_SET_USER_MEMORY_REGION, at, OwnMemory())
    recorder.end(entry, -errno.EINVAL)
    page = bytearray(4096)
    kvm_run.from_buffer(page).exit_reason = kvm.KVM_EXIT_HLT
    entry = recorder.ioctl(os.getpid(), os.getpid(), "vcpu", VCPU, ioctls.KVM_RUN, 0, NoMemory())
    recorder.end(entry, 0, page)
    assert recorder.close() == ""
    header, opened, refused, ran, end = lines(path)
    assert header["argv"] == ["./vmm", "-m", "1G"]
    assert header["platform"]["asids"] == 9
    assert (header["dialect"], header["record"]) == ("mainline", 1)
    assert (opened["call"], opened["in"], opened["result"]) == ("openat", {"path": "/dev/kvm"}, 5)
    assert opened["comm"] == Path("/proc/self/comm").read_text().strip()
    assert (refused["on"], refused["file"], refused["ioctl"]) == ("vm", 1, "KVM_SET_USER_MEMORY_REGION")
    assert refused["in"]["memory_size"] == 0x800
    assert (refused["result"], refused["error"]) == (-22, "EINVAL (invalid argument)")
    assert (ran["on"], ran["file"], ran["ioctl"], ran["exit"]) == ("vcpu", 2, "KVM_RUN", {"reason": "HLT"})
    assert ran["us"] >= 0
    assert ran["t"] >= refused["t"] >= opened["t"] >= 0
    assert end == {"end": "complete", "calls": 3, "dropped": 0}


def test_file_that_a_call_made_and_its_end(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "log", OPTIONS)
    number = recorder.number(VM)
    recorder.call(CallRecord(os.getpid(), os.getpid(), "open", fields={"path": "/dev/kvm"}, result=5, made=("system", number)))
    recorder.call(CallRecord(os.getpid(), os.getpid(), "mmap", "vcpu", recorder.number(VCPU), result=None))
    recorder.call(CallRecord(0, 0, "release", "system", recorder.number(VM), result=None))
    recorder.close()
    _, opened, mapped, released, end = lines(tmp_path / "log")
    assert (opened["made"], opened["result"]) == ({"on": "system", "file": number}, 5)
    assert (mapped["file"], "result" in mapped, "error" in mapped) == (number + 1, False, False)
    assert released.keys() == {"t", "call", "on", "file"}
    assert (released["call"], released["file"]) == ("release", number)
    assert end["calls"] == 3


def test_kvm_run_begins_with_what_was_asked_for(tmp_path: Path) -> None:
    recorder, page = Recorder(tmp_path / "log", OPTIONS), bytearray(12288)
    kvm_run.from_buffer(page).immediate_exit = 1
    entry = recorder.ioctl(1, 1, "vcpu", VCPU, ioctls.KVM_RUN, 0, NoMemory(), page)
    page[1] = 0
    recorder.end(entry, -errno.EINTR, page)
    entry = recorder.ioctl(1, 1, "vcpu", VCPU, ioctls.KVM_GET_MP_STATE, 0, OwnMemory(), page)
    recorder.end(entry, -errno.EFAULT, page)
    recorder.close()
    _, ran, other, _ = lines(tmp_path / "log")
    assert (ran["in"], ran["exit"]) == ({"immediate_exit": 1}, {"reason": "INTR"})
    assert "exit" not in other and "in" not in other


REQUESTS = [*sorted({row.number for row in table.rows()}), 0xAEFE, 0xFFFFFFFFFFFFFFFF]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(REQUESTS), st.sampled_from(["system", "vm", "vcpu", "sev", "guest_memfd", "stats"]),
    st.integers(0, (1 << 64) - 1), st.binary(max_size=96), st.integers(-4095, 1 << 31),
)  # fmt: skip
def test_any_call_is_one_line_of_bounded_json(request_: int, on: str, argument: int, data: bytes, result: int) -> None:
    class Repeated:
        def read(self, address: int, size: int) -> bytes:
            return (data * (size // max(len(data), 1) + 1))[:size] if data else bytes(size)

    page = bytearray(Repeated().read(0, 12288))
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(Path(folder) / "log", OPTIONS)
        recorder.end(recorder.ioctl(1, 1, on, VM, request_, argument, Repeated(), page), result, page)
        assert recorder.close() == ""
        text = (Path(folder) / "log").read_bytes()
    assert text.count(b"\n") == 3 and len(text) < 1 << 16
    assert json.loads(text.splitlines()[1])["result"] == result


def test_only_the_owner_may_read_it(tmp_path: Path) -> None:
    Recorder(tmp_path / "log", OPTIONS).close()
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o600


@pytest.mark.parametrize("limit", [1, LEAST_LIMIT, 200_000])
def test_limit_holds_and_is_told(limit: int, tmp_path: Path) -> None:
    path = tmp_path / "log"
    recorder = Recorder(path, ExecOptions(("x",), record_limit=limit))
    for _ in range(3000):
        recorder.call(me())
    words = recorder.close()
    limit = max(limit, LEAST_LIMIT)
    assert limit // 2 < path.stat().st_size <= limit
    *_, told, end = lines(path)
    assert "--record-limit" in told["limit"]
    assert end["end"] == "the limit was reached"
    assert end["calls"] + end["dropped"] == 3000
    assert f"{end['dropped']} calls are missing" in words


def test_long_arguments_leave_room(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "log", ExecOptions(("x" * 100_000,), record_limit=LEAST_LIMIT))
    recorder.call(me(fields={"path": "p" * 100_000}))
    recorder.close()
    header, call, _ = lines(tmp_path / "log")
    assert header["argv"] == "too long"
    assert "in" not in call


def test_full_disk_stops_the_recording_only() -> None:
    recorder = Recorder(Path("/dev/full"), OPTIONS)
    for _ in range(2000):
        recorder.call(me())
    assert "ENOSPC" in recorder.close()
    assert recorder.close()


def test_lines_arrive_while_it_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log"
    recorder = Recorder(path, OPTIONS)
    recorder.call(me())
    until = time.monotonic() + 5
    while path.read_text().count("\n") < 2 and time.monotonic() < until:
        time.sleep(0.02)
    assert len(lines(path)) == 2
    recorder.close()


def test_threads_write_whole_lines(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "log", OPTIONS)

    def work() -> None:
        for _ in range(500):
            recorder.end(recorder.ioctl(1, threading.get_native_id(), "system", VM, ioctls.KVM_GET_API_VERSION, 0, NoMemory()), 12)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.close()
    found = lines(tmp_path / "log")
    assert len(found) == 3002
    assert {line["result"] for line in found[1:-1]} == {12}


def test_name_that_a_program_chose_cannot_break_a_line(tmp_path: Path) -> None:
    before = Path("/proc/self/comm").read_text()
    recorder = Recorder(tmp_path / "log", OPTIONS)
    try:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_bytes(b'"}\n\x1b[2J\xff')
        recorder.call(me())
    finally:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(before)
    recorder.close()
    data = (tmp_path / "log").read_bytes()
    assert data.isascii()
    assert b"\x1b" not in data
    assert len(lines(tmp_path / "log")) == 3


def test_after_the_end_nothing_is_written(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "log", OPTIONS)
    recorder.close()
    recorder.call(me())
    assert len(lines(tmp_path / "log")) == 2


def test_place_that_cannot_be_written() -> None:
    with pytest.raises(CannotRecord, match="/dev/null/log cannot be written: not a directory"):
        Recorder(Path("/dev/null/log"), OPTIONS)
