"""A measurement as a file: what `sevmm run --save-launch` and `sevmm measure --save` write, and `--verify` reads.

One JSON object, version 1 (its first key, `sevmm_launch`). Byte strings are hex, numbers are integers, no key is left out:

    kind        "launch" or "prediction"
    setup       {guest, type, init, policy, memory, vcpus, arguments, c_bit, features}
    digest      SHA-256 over all that was measured
    regions     null, or [{gpa, size, sha256, pages: [sha256 of each 4 KiB page]}], ascending
    vmsas       null, or [{vcpu, sha256, fields: {name: integer of up to 128 bits}}]: what is not zero
    answer      null, or the firmware's (a prediction's: the one to expect) {version: null or [API major, minor, build], nonce, measure}

The file holds no key and nothing a host does not know anyway. `load` also takes the object that `run --json` prints, which has no
regions. A file is never trusted: each value is checked before it is used, and whatever is wrong ends in `SavedLaunchError`, one
sentence that names the file and the value.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from vmm import boot
from vmm.measure import C_BIT, FEATURES, INIT, INIT2, SEV_TYPES, Answer, MeasuredRegion, MeasuredVmsa, Measurement, Setup

VERSION = 1
LARGEST_FILE = 64 << 20
"""Bytes; the hashes of 1 GiB of measured memory fit four times."""

T = TypeVar("T")


class SavedLaunchError(Exception):
    """A file cannot be read as a saved launch, or not be written; one sentence that names it."""


# -- writing -----------------------------------------------------------------------------------------------------------------------------


def dumps(measurement: Measurement) -> str:
    """The JSON object, on one line."""
    setup = measurement.setup
    regions, vmsas, answer = measurement.regions, measurement.vmsas, measurement.answer
    return json.dumps({
        "sevmm_launch": VERSION,
        "kind": measurement.kind,
        "setup": {
            "guest": setup.guest, "type": setup.type, "init": setup.init, "policy": setup.policy, "memory": setup.memory,
            "vcpus": setup.vcpus, "arguments": setup.arguments.hex(), "c_bit": setup.c_bit, "features": setup.features,
        },
        "digest": measurement.digest.hex(),
        "regions": None if regions is None else [
            {"gpa": r.gpa, "size": r.size, "sha256": r.sha256.hex(), "pages": [page.hex() for page in r.pages]} for r in regions
        ],
        "vmsas": None if vmsas is None else [
            {"vcpu": v.vcpu, "sha256": v.sha256.hex(), "fields": dict(v.fields)} for v in vmsas
        ],
        "answer": None if answer is None else {
            "version": None if answer.version is None else list(answer.version),
            "nonce": answer.nonce.hex(), "measure": answer.measure.hex(),
        },
    })  # fmt: skip


def check_target(path: str | os.PathLike[str]) -> None:
    """Raise `SavedLaunchError` where `save` could not write: to be asked before a long run, not after it.

    A file that is there is replaced only if it is a saved launch itself (or empty): a slip of the fingers costs nobody a file.
    """
    target = Path(path)
    try:
        if target.is_dir() or not os.access(target.parent, os.W_OK | os.X_OK):
            raise SavedLaunchError(_cannot_write(target, "that is a folder" if target.is_dir() else _why_no_folder(target.parent)))
        if target.exists():
            found = target.stat()
            if not stat.S_ISREG(found.st_mode):
                raise SavedLaunchError(_cannot_write(target, "that is no ordinary file"))
            if found.st_size:
                load(target)
    except SavedLaunchError as failure:
        if str(failure).startswith("cannot write"):
            raise
        why = "the file that is there is no saved launch; remove it or choose another name"
        raise SavedLaunchError(_cannot_write(target, why)) from None
    except (OSError, ValueError) as failure:
        raise SavedLaunchError(_cannot_write(target, _words(failure))) from failure


def save(measurement: Measurement, path: str | os.PathLike[str]) -> None:
    """Write the file at once: a reader sees the old one or the new one, never half. Raises `SavedLaunchError`."""
    check_target(path)
    target = Path(path)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        try:
            scratch.write_text(dumps(measurement) + "\n")
            os.replace(scratch, target)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as failure:
        raise SavedLaunchError(_cannot_write(target, _words(failure))) from failure


def _cannot_write(target: Path, why: str) -> str:
    return f"cannot write {target}: {why}"


def _why_no_folder(folder: Path) -> str:
    return f"the folder {folder} may not be written" if folder.is_dir() else f"there is no folder {folder}"


def _words(failure: OSError | ValueError) -> str:
    return (getattr(failure, "strerror", None) or str(failure)).lower()


# -- reading -----------------------------------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str]) -> Measurement:
    """Read a saved launch, a saved prediction, or the output of `run --json`. Raises `SavedLaunchError`."""
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            text = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as failure:
        raise SavedLaunchError(f"{name}: {_words(failure)}") from failure
    if len(text) > LARGEST_FILE:
        raise SavedLaunchError(f"{name}: more than {LARGEST_FILE >> 20} MiB, too big for a saved launch")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as failure:
        raise SavedLaunchError(f"{name}: not a saved launch: no JSON ({failure})") from None
    try:
        return _parse(data)
    except _Wrong as wrong:
        raise SavedLaunchError(f"{name}: not a saved launch: {wrong}") from None


class _Wrong(Exception):
    """What is wrong with a value, and where."""


class _Object:
    """A JSON object whose values are taken out one by one, each checked; `where` is its place in the file."""

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise _Wrong(f"{where or 'the file'} is no JSON object")
        self._data, self._where = data, where

    def name(self, key: str) -> str:
        return f"{self._where}.{key}" if self._where else key

    def get(self, key: str) -> Any:
        if key not in self._data:
            raise _Wrong(f"{self.name(key)} is missing")
        return self._data[key]

    def number(self, key: str, low: int, high: int) -> int:
        """An integer of [low, high)."""
        value = self.get(key)
        if type(value) is not int or not low <= value < high:
            raise _Wrong(f"{self.name(key)} is no integer from {low} to {high - 1}")
        return value

    def choice(self, key: str, *known: str) -> str:
        value = self.get(key)
        if value not in known:
            raise _Wrong(f"{self.name(key)} is none of {', '.join(known)}")
        return str(value)

    def text(self, key: str) -> str:
        value = self.get(key)
        if not isinstance(value, str):
            raise _Wrong(f"{self.name(key)} is no text")
        return value

    def hex(self, key: str, size: int | None = None) -> bytes:
        """Hex of `size` bytes, or of any number."""
        return _hex(self.get(key), size, self.name(key))

    def optional(self, key: str, parse: Callable[[_Object], T]) -> T | None:
        value = self.get(key)
        return None if value is None else parse(_Object(value, self.name(key)))

    def rows(self, key: str) -> list[Any] | None:
        value = self.get(key)
        if value is not None and not isinstance(value, list):
            raise _Wrong(f"{self.name(key)} is no list")
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)


def _hex(value: Any, size: int | None, where: str) -> bytes:
    try:
        data = bytes.fromhex(value)
    except (TypeError, ValueError):
        raise _Wrong(f"{where} is no hex") from None
    if size is not None and len(data) != size:
        raise _Wrong(f"{where} has {len(data)} bytes, not {size}")
    return data


def _parse(data: Any) -> Measurement:
    top = _Object(data, "")
    if isinstance(data, dict) and "launch" in data and "sevmm_launch" not in data:
        return _run_output(top)
    version = top.get("sevmm_launch")
    if version != VERSION:
        raise _Wrong(f"its version is {version!r}, and this sevmm knows version {VERSION} only")
    kind = top.choice("kind", "launch", "prediction")
    setup = _setup(_Object(top.get("setup"), "setup"))
    regions, vmsas = top.rows("regions"), top.rows("vmsas")
    return Measurement(
        kind,
        setup,
        top.hex("digest", 32),
        None if regions is None else _regions(regions),
        None if vmsas is None else tuple(_vmsa(_Object(v, f"vmsas[{i}]"), i) for i, v in enumerate(vmsas)),
        top.optional("answer", _answer),
    )


def _setup(of: _Object) -> Setup:
    return Setup(
        guest=of.text("guest"),
        type=of.choice("type", *SEV_TYPES),
        init=of.choice("init", INIT, INIT2),
        policy=of.number("policy", 0, 1 << 32),
        memory=of.number("memory", boot.MIN_MEMORY, boot.MAX_MEMORY + 1),
        vcpus=of.number("vcpus", 1, boot.MAX_VCPUS + 1),
        arguments=of.hex("arguments"),
        c_bit=of.number("c_bit", 36, 52),
        features=of.number("features", 0, 1 << 64),
    )


def _regions(values: list[Any]) -> tuple[MeasuredRegion, ...]:
    found, end = [], -1
    for index, value in enumerate(values):
        of = _Object(value, f"regions[{index}]")
        gpa, size = of.number("gpa", 0, 1 << 52), of.number("size", boot.PAGE, 1 << 52)
        pages = of.rows("pages") or []
        if gpa % boot.PAGE or size % boot.PAGE or gpa <= end:
            raise _Wrong(f"regions[{index}] is not of whole pages, or not above the one before it")
        if len(pages) != size // boot.PAGE:
            raise _Wrong(f"regions[{index}].pages has {len(pages)} hashes for {size // boot.PAGE} pages")
        hashes = tuple(_hex(page, 32, f"regions[{index}].pages") for page in pages)
        found.append(MeasuredRegion(gpa, size, of.hex("sha256", 32), hashes))
        end = gpa + size
    return tuple(found)


def _vmsa(of: _Object, index: int) -> MeasuredVmsa:
    fields = _Object(of.get("fields"), of.name("fields"))
    values = {name: fields.number(name, 0, 1 << 128) for name in fields}
    return MeasuredVmsa(of.number("vcpu", index, index + 1), of.hex("sha256", 32), values)


def _answer(of: _Object) -> Answer:
    version = of.rows("version") if "version" in of else None  # the output of `run --json` has none
    if version is not None and (len(version) != 3 or not all(type(n) is int and 0 <= n < 256 for n in version)):
        raise _Wrong(f"{of.name('version')} is not [API major, API minor, build]")
    return Answer(None if version is None else (version[0], version[1], version[2]), of.hex("nonce", 16), of.hex("measure", 32))


def _run_output(top: _Object) -> Measurement:
    """The object of `run --json`: policy and digest; the rest of the setup is not in it, nor is the firmware's version."""
    launch = top.optional("launch", lambda of: (of.number("policy", 0, 1 << 32), of.hex("digest", 32), _answer(of)))
    if launch is None:
        raise _Wrong("launch is null: the run measured nothing (its type was not sev)")
    policy, digest, answer = launch
    setup = Setup(top.text("guest"), top.choice("type", *SEV_TYPES), policy, c_bit=C_BIT, features=FEATURES)
    return Measurement("launch", setup, digest, answer=answer)
