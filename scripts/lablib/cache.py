"""Steps: work that is done once for given inputs and kept.

A step has a name, a recipe (the version of the code that does it) and inputs; the sha256 over all of them is its key. What it makes lies in
`<cache>/lab/<name>-<key>/`:

    complete.json   written last: the step's result, its inputs and seconds. Without it the step is not done.
    log             what the commands of the step printed, newest attempt last
    ...             the results, and what an interrupted attempt left: the next one goes on from there

Invariants: changed inputs mean another directory, never a changed one; one process at a time works in a directory (flock on `lock`),
another waits and then finds the step done.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lablib.words import HELD, Failure, Progress, say

Result = dict[str, Any]


def cache_root() -> Path:
    """Where the lab keeps things: $XDG_CACHE_HOME/sevmm/lab, or ~/.cache/sevmm/lab."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "sevmm" / "lab"
    try:
        return Path.home() / ".cache" / "sevmm" / "lab"
    except RuntimeError as error:
        raise Failure("neither HOME nor XDG_CACHE_HOME is set: nowhere to keep the lab") from error


def key_of(name: str, recipe: int, inputs: dict[str, str]) -> str:
    """16 hex digits; the order of the inputs does not matter, every character of them does.

    >>> key_of("kernel", 1, {"a": "1", "b": "2"}) == key_of("kernel", 1, {"b": "2", "a": "1"})
    True
    """
    text = json.dumps([name, recipe, inputs], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Step:
    """One step with fixed inputs."""

    name: str
    recipe: int
    inputs: dict[str, str]

    @property
    def key(self) -> str:
        return key_of(self.name, self.recipe, self.inputs)

    @property
    def directory(self) -> Path:
        return cache_root() / f"{self.name}-{self.key}"

    @property
    def log(self) -> Path:
        return self.directory / "log"

    def result(self) -> Result | None:
        """What the step gave when it was done; None when it is not (or its record cannot be read)."""
        try:
            record = json.loads((self.directory / "complete.json").read_text())
        except (OSError, ValueError):
            return None
        result = record.get("result") if isinstance(record, dict) else None
        return result if isinstance(result, dict) else None

    def run(self, work: Callable[[Progress], Result]) -> Result:
        """The kept result, or that of `work`, which is then kept. A failure names the step and where its log is."""
        done = self.result()
        if done is not None:
            return done
        with self._locked():
            done = self.result()
            if done is not None:
                return done
            resumed = any(entry.name != "lock" for entry in self.directory.iterdir())
            say(f"{self.name}: {'resuming' if resumed else 'starting'} in {self.directory}")
            progress = Progress(self.name)
            try:
                result = work(progress)
                record = {"result": result, "inputs": self.inputs, "recipe": self.recipe, "seconds": round(progress.elapsed(), 1)}
                record["made"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                write_json(self.directory / "complete.json", record)
            except Failure as failure:
                raise Failure(f"step {self.name} failed: {failure}\n`scripts/lab setup` resumes here") from failure
            except OSError as error:
                raise Failure(f"step {self.name} failed: {error}\nin {self.directory}; `scripts/lab setup` resumes here") from error
            except KeyboardInterrupt:
                say(f"{self.name}: interrupted; `scripts/lab setup` resumes here")
                raise
            progress.done("done")
            return result

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise Failure(f"{self.directory}: {error.strerror}\nset XDG_CACHE_HOME to a directory that can be written") from error
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"{self.name}: another process works on this step; waiting for it")
                fcntl.flock(fd, fcntl.LOCK_EX)
            HELD.append(fd)
            try:
                yield
            finally:
                HELD.remove(fd)
        finally:
            os.close(fd)


def write_json(path: Path, record: object) -> None:
    """Write in one go: a reader sees the old file, or the new one."""
    scratch = path.with_name(f".{path.name}-{os.getpid()}")
    scratch.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(scratch, path)


def size_of(path: Path) -> int:
    """Bytes that a directory takes on its disk (hard links once)."""
    seen: set[int] = set()
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            try:
                stat = os.lstat(os.path.join(folder, name))
            except OSError:
                continue  # gone meanwhile
            if stat.st_ino not in seen:
                seen.add(stat.st_ino)
                total += stat.st_blocks * 512
    return total


def remove(path: Path) -> None:
    """Remove a file or a directory; absent is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
