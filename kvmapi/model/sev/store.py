"""The platform's non-volatile memory as one file: what survives from one process to the next, as a chip's keys do.

    $XDG_STATE_HOME/sevmm/platform      (~/.local/state/sevmm/platform)    mode 0600, in a directory of mode 0700

The file holds private keys. It is read into one buffer that is wiped after use, replaced as a whole (written beside,
synced, renamed), and whoever reads in order to change holds a lock on `platform.lock` meanwhile: two processes that
generate keys at once end up with one set. A file that is damaged, of another version, or readable by others is refused with its
name and the remedy; it is never repaired or overwritten silently.

Layout, integers little-endian: magic (8 bytes), version u32, length of the rest u32, SHA-256 of the rest; then parts,
each a tag (4 bytes), a length u32 and that many bytes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from kvmapi.wiping import wipe

MAGIC = b"SEVMMNV\0"
VERSION = 1
LARGEST = 64 * 1024
_HEAD = struct.Struct("<8sII32s")
_PART = struct.Struct("<4sI")
Readable = bytes | bytearray | memoryview


class StoreError(Exception):
    """The file cannot be used. `path`, `reason` (what is wrong) and `remedy`; the text has all three."""

    def __init__(self, path: Path, reason: str, remedy: str) -> None:
        super().__init__(f"the model platform's keys in {path} cannot be used: {reason}; {remedy}")
        self.path = path
        self.reason = reason
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[StoreError], tuple[Path, str, str]]:
        return (type(self), (self.path, self.reason, self.remedy))


class StoreUnreachableError(StoreError):
    """There is no place for the file: its directory cannot be made or written. Whoever can do without goes on in memory."""


def default_path() -> Path:
    """Where the command line keeps its model's keys; a relative XDG_STATE_HOME does not count (XDG base directories).

    Raises `StoreUnreachableError` for a user without a home.
    """
    state = os.environ.get("XDG_STATE_HOME", "")
    try:
        base = Path(state) if state.startswith("/") else Path.home() / ".local" / "state"
    except RuntimeError:
        place = Path("~/.local/state/sevmm/platform")
        raise StoreUnreachableError(place, "this user has no home directory", "set XDG_STATE_HOME") from None
    return base / "sevmm" / "platform"


class Record:
    """The file's parts, as views of one buffer that `wipe` overwrites. A context manager."""

    def __init__(self, buffer: bytearray, parts: dict[bytes, memoryview]) -> None:
        self._buffer = buffer
        self.parts = parts

    def __repr__(self) -> str:
        return f"Record({len(self.parts)} parts, never shown)"

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *exception: object) -> None:
        for part in self.parts.values():
            part.release()
        self.parts = {}
        wipe(self._buffer)


class Store:
    """One such file. Nothing is touched before the first `load` or `save`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r})"

    def check(self) -> None:
        """Can it be used? Makes the directory, and looks whether the file, if there is one, is whole. Raises `StoreError`."""
        with self.locked():
            if not os.access(self.path.parent, os.W_OK):
                raise self._unusable(PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
            record = self.load()
            if record is not None:
                with record:
                    pass

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the file's lock; waits for another process that has it."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(self.path.with_name(self.path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as failure:
            raise self._unusable(failure) from failure
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def stamp(self) -> tuple[int, int, int] | None:
        """What changes whenever the file is replaced; None while there is no file."""
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def load(self) -> Record | None:
        """The parts, or None if there is no file yet. Raises `StoreError`."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as failure:
            raise self._unusable(failure) from failure
        try:
            buffer = self._read(fd)
        except OSError as failure:
            raise self._unusable(failure) from failure
        finally:
            os.close(fd)
        try:
            return Record(buffer, self._parse(buffer))
        except StoreError:
            wipe(buffer)
            raise

    def _read(self, fd: int) -> bytearray:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise self.damaged("it is no ordinary file")
        if status.st_mode & 0o077:
            raise StoreError(self.path, f"others may read it (mode {status.st_mode & 0o777:04o})", f"chmod 600 {self.path}")
        if not _HEAD.size <= status.st_size <= LARGEST:
            raise self.damaged(f"it has {status.st_size} bytes")
        buffer = bytearray(status.st_size)
        if os.readv(fd, [buffer]) != len(buffer):
            wipe(buffer)
            raise self.damaged("it ends early")
        return buffer

    def save(self, parts: Mapping[bytes, Readable]) -> None:
        """Replace the file by these parts; the caller holds the lock. Raises `StoreError`, and the old file stays."""
        size = _HEAD.size + sum(_PART.size + len(part) for part in parts.values())
        buffer, at = bytearray(size), _HEAD.size
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}.new")
        try:
            with memoryview(buffer) as view:  # straight from view to view: bytearray's own slices take a copy in between
                for tag, part in parts.items():
                    _PART.pack_into(view, at, tag, len(part))
                    at += _PART.size
                    view[at : at + len(part)] = part
                    at += len(part)
                with view[_HEAD.size :] as rest:
                    _HEAD.pack_into(view, 0, MAGIC, VERSION, len(rest), hashlib.sha256(rest).digest())
            self._replace(beside, buffer)
        except OSError as failure:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise self._unusable(failure) from failure
        finally:
            wipe(buffer)

    def _replace(self, beside: Path, buffer: bytearray) -> None:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()  # of a process that died with our number
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            done = 0
            with memoryview(buffer) as view:
                while done < len(view):
                    done += os.write(fd, view[done:])
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(beside, self.path)
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _parse(self, buffer: bytearray) -> dict[bytes, memoryview]:
        magic, version, length, digest = _HEAD.unpack_from(buffer)
        if magic != MAGIC:
            raise self.damaged("it is another kind of file")
        if version != VERSION:
            remedy = "use the program that wrote it, or move it away"
            raise StoreError(self.path, f"it has version {version}, this program knows {VERSION}", remedy)
        with memoryview(buffer) as view, view[_HEAD.size :] as rest:
            if length != len(rest) or hashlib.sha256(rest).digest() != digest:
                raise self.damaged("its checksum is wrong")
        parts: dict[bytes, memoryview] = {}
        at = _HEAD.size
        while at < len(buffer):
            if at + _PART.size > len(buffer):
                raise self.damaged("a part is cut off")
            tag, size = _PART.unpack_from(buffer, at)
            at += _PART.size
            if size > len(buffer) - at or tag in parts:
                raise self.damaged("a part is cut off or stands there twice")
            parts[tag] = memoryview(buffer)[at : at + size]
            at += size
        return parts

    def damaged(self, what: str) -> StoreError:
        """The error for a file that is no platform's; `what` is wrong with it."""
        return StoreError(self.path, f"{what}, so it is damaged", "move it away, and the next start makes a new platform with new keys")

    def _unusable(self, failure: OSError) -> StoreError:
        why = (failure.strerror or str(failure)).lower()
        return StoreUnreachableError(self.path, why, "make the directory writable for you, or set XDG_STATE_HOME to one that is")
