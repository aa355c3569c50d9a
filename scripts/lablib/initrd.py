"""What the guest starts from: its first process (init.c and streams.c, compiled once) and the job, in one small archive made for each run.

The archive is cpio's "newc" format, written here: device nodes in it need no root. Layout: a 110-byte header of 8-digit hex fields, the
name, the data, each padded to 4 bytes (Documentation/driver-api/early-userspace/buffer-format.rst).
"""

from __future__ import annotations

import functools
import stat
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from lablib import packages
from lablib.cache import Result, Step
from lablib.words import Failure, Progress

SOURCES = tuple(Path(__file__).with_name(name) for name in ("init.c", "streams.c", "init.h"))
FOLDERS = ("dev", "host", "rw", "root")


@dataclass(frozen=True)
class Job:
    """A command for the guest; `tty` is (rows, columns) when it runs on a terminal of its own."""

    command: list[str]
    cwd: str = "/"
    environment: dict[str, str] = field(default_factory=dict)
    tty: tuple[int, int] | None = None

    def encode(self) -> bytes:
        """Strings "key=value", each ended by NUL, as init.c reads them. Raises `Failure` for what cannot be said that way."""
        strings = [f"arg={word}" for word in self.command]
        strings += [f"env={name}={value}" for name, value in sorted(self.environment.items())]
        strings.append(f"cwd={self.cwd}")
        if self.tty is not None:
            strings.append(f"tty={self.tty[0]} {self.tty[1]}")
        if not self.command or any("\0" in text for text in strings):
            raise Failure("a command for the lab is one word or more, without NUL bytes")
        data = b"".join(text.encode("utf-8", "surrogateescape") + b"\0" for text in strings)
        if len(data) >= 1 << 20:
            raise Failure("the command and its environment are larger than 1 MiB")
        return data


def init_step() -> Step:
    """The compiled first process."""
    return Step("init", 1, {path.name: path.read_text() for path in SOURCES})


def build_init() -> Path:
    """The program's path; compiled when it is not there (a second)."""
    step = init_step()
    step.run(functools.partial(_compile, step))
    return step.directory / "init"


def _compile(step: Step, progress: Progress) -> Result:
    lacking = packages.missing("init")
    if lacking:
        raise Failure(f"this machine lacks {', '.join(lacking)}\n{packages.how_to_get(lacking)}")
    output = step.directory / "init"
    command = ["gcc", "-std=gnu11", "-Wall", "-O2", "-static", "-s", "-o", str(output)]
    command += [str(path) for path in SOURCES if path.suffix == ".c"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    step.log.write_text(done.stdout + done.stderr)
    if done.returncode != 0:
        raise Failure(f"gcc ended with status {done.returncode}; see {step.log}")
    return {"bytes": output.stat().st_size}


def archive(init: Path, job: Job) -> bytes:
    """The whole initramfs."""
    entries = [_entry(name, stat.S_IFDIR | 0o755) for name in FOLDERS]
    entries.append(_entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)))
    entries.append(_entry("init", stat.S_IFREG | 0o755, init.read_bytes()))
    entries.append(_entry("job", stat.S_IFREG | 0o600, job.encode()))
    entries.append(_entry("TRAILER!!!", 0))
    return b"".join(entries)


def _entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    label = name.encode() + b"\0"
    numbers = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(label), 0)
    header = b"070701" + b"".join(b"%08X" % number for number in numbers)
    return _padded(header + label) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
