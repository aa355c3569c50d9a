"""`--record FILE`: every call on /dev/kvm, /dev/sev and the fds that come from them, decoded, as JSON lines.

The first line is a header; then one line per call, in the order in which calls *ended*; the last line says how it ended. A call
that the kernel carries out after we have looked at it (mmap of a vCPU) has no result. A file has a number from its open or
making on; the line `release` says that its last fd and mapping are gone, and names no process, because nobody knows whose.

    {"sevmm": "0.1.0", "record": 1, "started": …, "kernel": …, "argv": […], "platform": {…}, "dialect": "mainline", …}
    {"t": 0.0123, "pid": 77, "tid": 77, "comm": "vmm", "call": "ioctl", "on": "vm", "file": 2,
     "ioctl": "KVM_SET_USER_MEMORY_REGION", "in": {"slot": 0, …}, "result": 0, "us": 812.5}
    {"t": 0.9, "call": "release", "on": "vm", "file": 2}
    {"end": "complete", "calls": 2041, "dropped": 0}

Invariants: no line holds guest memory, secrets, keys or what a pointer to payload points at (decode.py); the file never
grows beyond its limit, however long a hostile program goes on; a disk that is full stops the recording and not the program;
lines are whole, and reach the file within a quarter of a second, so that a program that hangs can be watched. The file is
readable for its owner only: it has register values.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from kvmapi.exits import Mapping as RunMapping
from kvmapi.words import errno_words
from vmm.exec.decode import Call, Decoder, exit_fields, run_fields
from vmm.exec.options import CannotRecord, ExecOptions

LEAST_LIMIT = 8192
_RESERVE = 1024  # for the last two lines
_FULL_BUFFER = 64 << 10
_LONGEST_LINE = 64 << 10
_FLUSH_AFTER = 0.25  # seconds


class Memory(Protocol):
    """As much of `kvmapi.model.caller.Memory` as recording takes."""

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes at `address`, or Errno(EFAULT)."""


@dataclass(slots=True)
class CallRecord:
    """One call. `pid` 0: nobody knows whose. `on` is the kind of file (rows.On, or the model's word for it), `file` its number, from
    1: the same for all fds of one file; `made` is (kind, number) of the file that the call made. `fields` are arguments by name; for an
    ioctl `Recorder.ioctl` fills in what is decoded. `result`: as the system call's, or -errno; None where only the kernel knows it.
    """

    pid: int
    tid: int
    call: str
    on: str = ""
    file: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict)
    result: int | None = 0
    made: tuple[str, int] | None = None
    began: float = field(default_factory=time.perf_counter)
    argument: int = 0
    memory: Memory | None = None
    decoded: Call | None = None


class Recorder:
    """The file being written. Any thread may call any method."""

    def __init__(self, path: Path, options: ExecOptions) -> None:
        """Open and truncate `path`, and write the header. CannotRecord where it cannot be written."""
        self._decoder = Decoder(options.dialect)
        self._limit = max(options.record_limit, LEAST_LIMIT)
        self._start = time.perf_counter()
        self._changed = threading.Condition()
        self._buffer: list[bytes] = []
        self._buffered = self._taken = self._calls = self._dropped = 0
        self._numbers: WeakKeyDictionary[object, int] = WeakKeyDictionary()
        self._files = 0  # the last number given
        self._flusher: threading.Thread | None = None
        self._closed = self._full = False
        self._failure = ""
        try:  # once: a second open would lose the reader of a FIFO
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError as failure:
            raise CannotRecord(f"{path} cannot be written: {(failure.strerror or str(failure)).lower()}") from failure
        header = json.dumps(_header(options, self._limit)).encode()
        if len(header) > self._limit - _RESERVE:
            header = json.dumps(_header(options, self._limit, arguments=False)).encode()
        self._put(header)

    def number(self, file: object) -> int:
        """The number of a file of the model, given now if it has none."""
        with self._changed:
            number = self._numbers.setdefault(file, self._files + 1)
            self._files = max(self._files, number)
            return number

    def ioctl(
        self, pid: int, tid: int, on: str, file: object, request: int, argument: int, memory: Memory, run: RunMapping | None = None
    ) -> CallRecord:
        """An ioctl on `file` of the model begins: decode what it passes. `run`: the kvm_run of a vCPU. Give the record to `end` with
        the result.
        """
        entry = CallRecord(pid, tid, "ioctl", on, self.number(file), argument=argument, memory=memory)
        entry.decoded = self._decoder.before(on, request, argument, memory.read)
        if run is not None and entry.decoded.name == "KVM_RUN":
            entry.decoded.fields.update(run_fields(run))
        return entry

    def end(self, entry: CallRecord, result: int | None, run: RunMapping | None = None) -> None:
        """The call is about to be answered with `result` (None: by the kernel); `run`: the vCPU's kvm_run, if it was KVM_RUN."""
        took = None if result is None else time.perf_counter() - entry.began
        entry.result = result
        line = self._line(entry)
        call = entry.decoded
        if call is not None and entry.memory is not None:
            line["ioctl"] = call.name
            if call.command is not None:
                line["command"] = call.command
            if call.fields:
                line["in"] = call.fields
            if result is not None and (out := self._decoder.after(call, entry.argument, result, entry.memory.read)):
                line["out"] = out
            if result is not None and run is not None and call.name == "KVM_RUN":
                line["exit"] = exit_fields(run, result)
        self._take(line, entry, took)

    def call(self, entry: CallRecord) -> None:
        """A call that is no ioctl (open, mmap, fallocate) has ended; `entry.result` is set. How long it took is not recorded."""
        self._take(self._line(entry), entry, None)

    def close(self) -> str:
        """Write what is left and the last line. Why the recording is not complete, or ""."""
        with self._changed:
            if not self._closed:
                end = "complete" if not self._full and not self._failure else self._failure or "the limit was reached"
                self._put(json.dumps({"end": end, "calls": self._calls, "dropped": self._dropped}).encode())
                self._closed = True
                self._flush()
                self._changed.notify_all()
                with contextlib.suppress(OSError):
                    os.close(self._fd)
        if self._flusher is not None:
            self._flusher.join()
        if self._failure:
            return f"the recording is not complete: {self._failure}"
        return f"the recording is not complete: --record-limit was reached, {self._dropped} calls are missing" if self._full else ""

    # --- inside ------------------------------------------------------------------------------------------------------

    def _line(self, entry: CallRecord) -> dict[str, Any]:
        line: dict[str, Any] = {"t": round(entry.began - self._start, 6)}
        if entry.pid:
            line.update(pid=entry.pid, tid=entry.tid, comm=comm(entry.tid))
        line["call"] = entry.call
        if entry.on:
            line["on"] = entry.on
        if entry.file:
            line["file"] = entry.file
        if entry.fields:
            line["in"] = dict(entry.fields)
        return line

    def _take(self, line: dict[str, Any], entry: CallRecord, took: float | None) -> None:
        if entry.made is not None:
            line["made"] = {"on": entry.made[0], "file": entry.made[1]}
        if entry.result is not None:
            line["result"] = entry.result
        if entry.result is not None and entry.result < 0:
            line["error"] = errno_words(-entry.result)
        if took is not None:
            line["us"] = round(took * 1e6, 1)
        text = json.dumps(line, default=repr).encode()
        if len(text) > _LONGEST_LINE:
            text = json.dumps({name: value for name, value in line.items() if name not in ("in", "out", "exit")}).encode()
        with self._changed:
            if self._closed:
                return
            if self._full or self._failure or self._taken + len(text) + 1 > self._limit - _RESERVE:
                self._dropped += 1
                if not self._full and not self._failure:
                    self._full = True
                    words = f"the limit of {self._limit} bytes was reached; later calls are not recorded (--record-limit)"
                    self._put(json.dumps({"limit": words}).encode())
                return
            self._calls += 1
            self._put(text)

    def _put(self, text: bytes) -> None:
        """Buffer a line; the lock is held (or nobody else knows us yet)."""
        self._buffer.append(text + b"\n")
        self._buffered += len(text) + 1
        self._taken += len(text) + 1
        if self._buffered >= _FULL_BUFFER:
            self._flush()
        elif self._flusher is None and not self._closed and self._calls:
            self._flusher = threading.Thread(target=self._flush_often, name="recorder", daemon=True)
            self._flusher.start()

    def _flush(self) -> None:
        data, self._buffer, self._buffered = b"".join(self._buffer), [], 0
        view = memoryview(data)
        while view and not self._failure:
            try:
                view = view[os.write(self._fd, view) :]
            except OSError as failure:
                self._failure = errno_words(failure.errno or errno.EIO)

    def _flush_often(self) -> None:
        with self._changed:
            while not self._closed:
                self._changed.wait(_FLUSH_AFTER)
                if not self._closed and self._buffer:
                    self._flush()


def comm(tid: int) -> str:
    """The thread's name now; a program may choose it, so it is escaped by JSON and nothing else believes it."""
    try:
        with open(f"/proc/{tid}/comm", "rb", buffering=0) as file:
            return file.read(64).decode(errors="backslashreplace").rstrip("\n")
    except OSError:
        return ""


def _header(options: ExecOptions, limit: int, arguments: bool = True) -> dict[str, Any]:
    from vmm.version import version

    system = os.uname()
    return {
        "sevmm": version(),
        "record": 1,
        "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "kernel": f"{system.sysname} {system.release} {system.machine}",
        "argv": list(options.argv) if arguments else "too long",
        "platform": asdict(options.machine),
        "dialect": options.dialect,
        "fallthrough": options.fallthrough,
        "cpuid": "host" if options.host_cpuid else "model",
        "limit": limit,
    }
