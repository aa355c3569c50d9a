"""What `sevmm exec` was asked for: plain values, so that parsing them loads neither the model nor the supervisor.

`Machine` is the platform that the program finds, as the command line says it: a preset, and settings on top of it.

    >>> machine("sev-es")
    Machine(sev=True, sev_es=True, asids=15, min_sev_asid=5, debug_swap=False, memlock=None)
    >>> machine("sev,asids=100").min_sev_asid
    1
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmapi.model.platform import Platform

RECORD_LIMIT = 256 << 20
"""Bytes of a recording, unless --record-limit says otherwise."""

_MOST_ASIDS = 65535


class CannotExec(Exception):
    """This host cannot do it: exit status 4. The text says what is missing and how to get it."""


class CannotRecord(Exception):
    """The recording's file cannot be written: exit status 2."""


@dataclass(frozen=True)
class Machine:
    """Values for `kvmapi.model.platform.Platform`. `memlock` None: as the environment says (SEVMM_MODEL_MEMLOCK)."""

    sev: bool = True
    sev_es: bool = True
    asids: int = 15
    min_sev_asid: int = 5
    debug_swap: bool = False
    memlock: bool | None = None

    def platform(self, dialect: str = "mainline") -> Platform:
        """The platform itself; this loads the model."""
        from kvmapi.model.platform import Platform

        return Platform(
            sev=self.sev, es=self.sev_es, asids=self.asids, min_sev_asid=self.min_sev_asid,
            debug_swap=self.debug_swap, memlock=self.memlock, dialect=dialect,
        )  # fmt: skip


PRESETS = {
    "sev-es": Machine(),
    "sev": Machine(sev_es=False, min_sev_asid=1),
    "none": Machine(sev=False, sev_es=False),
}
"""sev-es: SEV and SEV-ES as on a first EPYC; sev: SEV alone, with all ASIDs; none: a KVM without SEV."""

SETTINGS = {
    "asids": f"1 to {_MOST_ASIDS}",
    "min-sev-asid": "1 to asids + 1; those below it are for SEV-ES",
    "debug-swap": "on or off",
    "memlock": "on or off",
}
"""What may stand before an `=`, and what behind it."""

PLATFORM_WORDS = f"{', '.join(PRESETS)}, then settings: " + ", ".join(f"{name}=({words})" for name, words in SETTINGS.items())


def machine(text: str) -> Machine:
    """`sev`, `sev-es,asids=100,min-sev-asid=10`, `memlock=on`. ValueError with a sentence that says what is allowed."""
    first, *rest = text.split(",")
    if "=" in first:
        first, rest = "sev-es", [first, *rest]
    if first not in PRESETS:
        raise ValueError(f"{first!r} is no platform (allowed: {PLATFORM_WORDS})")
    made = PRESETS[first]
    seen: set[str] = set()
    for part in rest:
        name, equals, value = part.partition("=")
        if name not in SETTINGS or not equals:
            raise ValueError(f"{part!r} is no setting of a platform (allowed: {PLATFORM_WORDS})")
        if name in seen:
            raise ValueError(f"{name} is there twice")
        seen.add(name)
        made = _set(made, name, value)
    _check(made, seen, first)
    return made


def _set(made: Machine, name: str, value: str) -> Machine:
    if name == "asids":
        return replace(made, asids=_number(name, value))
    if name == "min-sev-asid":
        return replace(made, min_sev_asid=_number(name, value))
    if value not in ("on", "off"):
        raise ValueError(f"{name}={value}: {SETTINGS[name]} is allowed")
    return replace(made, debug_swap=value == "on") if name == "debug-swap" else replace(made, memlock=value == "on")


def _number(name: str, value: str) -> int:
    if not (value.isascii() and value.isdigit()) or len(value) > 6 or not 1 <= int(value) <= _MOST_ASIDS + 1:
        raise ValueError(f"{name}={value}: {SETTINGS[name]} is allowed")
    return int(value)


def _check(made: Machine, seen: set[str], preset: str) -> None:
    """Settings that say something about what the platform has not, and splits that no BIOS makes, are mistakes."""
    if not made.sev and (useless := seen - {"memlock"}):
        raise ValueError(f"{', '.join(sorted(useless))} means nothing on platform {preset}, which has no SEV")
    if made.asids > _MOST_ASIDS:
        raise ValueError(f"asids={made.asids}: {SETTINGS['asids']} is allowed")
    if made.sev and made.min_sev_asid > made.asids + 1:
        raise ValueError(
            f"min-sev-asid={made.min_sev_asid} does not split ASIDs 1..{made.asids}: 1 (none for SEV-ES) to {made.asids + 1} (all)"
        )
    if made.debug_swap and not (made.sev_es and made.min_sev_asid > 1):
        raise ValueError("debug-swap=on is a feature of SEV-ES guests, which this platform has not (platform sev-es, min-sev-asid above 1)")


@dataclass(frozen=True)
class ExecOptions:
    """One `sevmm exec`. `argv` is the program with its arguments, not empty; `record` None: nothing is recorded;
    `host_cpuid`: the program sees this machine's CPUID, and nobody traces it.
    """

    argv: tuple[str, ...]
    machine: Machine = Machine()
    dialect: str = "mainline"
    fallthrough: bool = False
    host_cpuid: bool = False
    record: Path | None = None
    record_limit: int = RECORD_LIMIT
    verbose: bool = False

    def platform(self) -> Platform:
        """The machine in this dialect; this loads the model."""
        return self.machine.platform(self.dialect)
