"""A platform's certificates as files: what `sevmm platform` writes and reads.

    pdh.cert pek.cert oca.cert cek.cert      one certificate each (2084 bytes)
    cert_chain.cert                          PEK, OCA, CEK, as the ioctl gives them
    ask.cert ark.cert                        AMD's two, in AMD's format; or both in ask_ark.cert, as AMD publishes them

These are the names of AMD's SEV tool. A file of sevctl's export (PDH, PEK, OCA, CEK, then ASK and ARK if it is a full one) is read
too. Files are written beside their place, synced, and put there in one step; without `force` nothing is overwritten, and either all
files of a call are there afterwards or none.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from kvmapi.abi.cert import SEV_CERT_SIZE
from kvmapi.cert_chain import Chain

CHAIN = "cert_chain.cert"
ASK_ARK = "ask_ark.cert"
LARGEST = 16 * 1024
"""Bytes of a file that are read at most; the largest that makes sense has 11,536."""


class FileProblemError(Exception):
    """A file cannot be read or written; one sentence with its name and what to do."""


def export_files(pdh: bytes, chain: bytes, amd: bytes) -> dict[str, bytes]:
    """The files of an export, by name; `amd` (ASK, ARK) may be empty."""
    parts = Chain.of(pdh, chain, amd)
    files = {"pdh.cert": parts.pdh, "pek.cert": parts.pek, "oca.cert": parts.oca, "cek.cert": parts.cek, CHAIN: chain}
    return files | ({"ask.cert": parts.ask, "ark.cert": parts.ark} if amd else {})


def write(place: Path, files: Mapping[str, bytes], *, force: bool, make: bool = True) -> None:
    """Put files into a directory, which is made if need be and asked for. Raises `FileProblemError`."""
    try:
        if make:
            place.mkdir(parents=True, exist_ok=True)
        elif not place.is_dir():
            raise FileProblemError(f"there is no folder {place}")
        taken = [name for name in files if os.path.lexists(place / name)]
        if taken and not force:
            raise FileProblemError(f"{place} has {', '.join(taken)} already; --force overwrites, or name another place")
        _write_all(place, files, force)
    except OSError as failure:
        raise FileProblemError(f"{failure.filename or place} cannot be written: {_why(failure)}") from failure


def _write_all(place: Path, files: Mapping[str, bytes], force: bool) -> None:
    beside = {name: place / f".{name}.{os.getpid()}.new" for name in files}
    made: list[Path] = []
    try:
        for name, content in files.items():
            _write_new(beside[name], content)
        for name, new in beside.items():
            if force:
                os.replace(new, place / name)
            else:
                os.link(new, place / name)  # unlike a rename it refuses what appeared meanwhile
                made.append(place / name)
    except BaseException:
        _remove(made)
        raise
    finally:
        _remove(beside.values())
    with contextlib.closing(_Directory(place)) as directory:
        os.fsync(directory.fd)


def _write_new(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


class _Directory:
    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self.fd)


def read(path: Path) -> bytes:
    """A file of certificates. Raises `FileProblemError`."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as failure:
        raise FileProblemError(f"{path} cannot be read: {_why(failure)}") from failure
    if not data or len(data) > LARGEST:
        what = "is empty" if not data else f"has more than {LARGEST} bytes"
        raise FileProblemError(f"{path} {what}: it is no certificate")
    return data


def read_chain(path: Path) -> Chain:
    """The chain in a directory, or in a file of sevctl's. Raises `FileProblemError`."""
    if not path.is_dir():
        data = read(path)
        return Chain.of(data[:SEV_CERT_SIZE], data[SEV_CERT_SIZE : 4 * SEV_CERT_SIZE], data[4 * SEV_CERT_SIZE :])
    names = ("pdh", "pek", "oca", "cek", "ask", "ark")
    found = {name: read(path / f"{name}.cert") for name in names if os.path.lexists(path / f"{name}.cert")}
    platform = read(path / CHAIN) if os.path.lexists(path / CHAIN) else b""
    amd = read(path / ASK_ARK) if os.path.lexists(path / ASK_ARK) else b""
    if not (found or platform or amd):
        raise FileProblemError(f"{path} has no certificates (pdh.cert, pek.cert, ...): sevmm platform export {path} writes them")
    spare = Chain.of(b"", platform, amd)
    return Chain(**{name: found.get(name) or getattr(spare, name) for name in names})


def _why(failure: OSError) -> str:
    return (failure.strerror or str(failure)).lower()
