"""What a run says about itself: one object, whose JSON form is a contract.

`RunReport.to_json()` has exactly the keys of `sevmm run --json`; scripts rely on them, so nothing is added there. What a person wants to
know besides (the sentence that explains an error, notes about truncated output) is kept in attributes that are not part of the JSON.

Invariants: ranges are half-open `[gpa, gpa + size)`; addresses and sizes are integers (GPA, bytes); byte strings become hex in JSON;
`result` is one of `RESULTS`; `exit_code` is the guest's own code or None when the guest did not get to say one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vmm.conversion import Conversion
from vmm.gpamap import MappedRange

if TYPE_CHECKING:
    from vmm.measure import MeasuredRegion, MeasuredVmsa

RESULTS = ("pass", "fail", "timeout", "unsupported", "error")

EXIT_UNSUPPORTED = 4  # as kselftest's skip
EXIT_TIMEOUT = 124  # as timeout(1)
EXIT_USAGE = 2
EXIT_VMM_FAILED = 70  # EX_SOFTWARE of sysexits.h


@dataclass(frozen=True)
class LaunchReport:
    """The measured launch of one guest: what the firmware said beside what we computed ourselves.

    `digest` is our SHA-256 over everything that was measured, `measure` the firmware's 32-byte MAC, `nonce` its 16-byte nonce,
    `expected` our own MAC over digest and nonce with the owner's integrity key; `match` says that the two MACs are equal.

    Not in the JSON: `version` of the firmware (API major, minor, build); `regions` and `vmsas` with their hashes, where they were asked
    for (`vmm.measure`; VMSAs of SEV-ES only).
    """

    policy: int
    digest: bytes
    measure: bytes
    nonce: bytes
    expected: bytes
    match: bool
    version: tuple[int, int, int] = (0, 0, 0)
    regions: tuple[MeasuredRegion, ...] | None = None
    vmsas: tuple[MeasuredVmsa, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON object under `launch`; byte strings as hex."""
        return {
            "policy": self.policy,
            "digest": self.digest.hex(),
            "measure": self.measure.hex(),
            "nonce": self.nonce.hex(),
            "expected": self.expected.hex(),
            "match": self.match,
        }


@dataclass
class RunReport:
    """The outcome of one run of one guest.

    Not in the JSON: `message` (one sentence why the result is error, timeout or unsupported; empty otherwise), `remedy` (what to do about
    it, if anything is known), `notes` (things worth a line on stderr), `conversions_total` (all conversions, also those that the bounded
    record no longer holds) and `usage` (the request itself was wrong: exit status 2).
    """

    guest: str
    type: str
    dialect: str = "mainline"
    rung: str | None = None
    rung_reason: str = ""
    result: str = "error"
    exit_code: int | None = None
    console: str = ""
    exits: dict[str, int] = field(default_factory=dict)
    conversions: Sequence[Conversion] = ()
    map: Sequence[MappedRange] = ()
    launch: LaunchReport | None = None
    elapsed_s: float = 0.0
    message: str = ""
    remedy: str = ""
    notes: list[str] = field(default_factory=list)
    conversions_total: int = 0
    usage: bool = False

    @property
    def exit_status(self) -> int:
        """Exit status of the process: the guest's own code, or 4 unsupported, 124 timeout, 2 usage, 70 the VMM failed."""
        if self.result in ("pass", "fail") and self.exit_code is not None:
            return self.exit_code
        if self.result == "timeout":
            return EXIT_TIMEOUT
        if self.result == "unsupported":
            return EXIT_UNSUPPORTED
        return EXIT_USAGE if self.usage else EXIT_VMM_FAILED

    def to_json(self) -> dict[str, Any]:
        """The object of `sevmm run --json`: exactly the keys of the contract, in its order."""
        return {
            "guest": self.guest,
            "type": self.type,
            "dialect": self.dialect,
            "rung": self.rung,
            "rung_reason": self.rung_reason,
            "result": self.result,
            "exit_code": self.exit_code,
            "console": self.console,
            "exits": dict(self.exits),
            "conversions": [c.to_json() for c in self.conversions],
            "map": [r.to_json() for r in self.map],
            "launch": None if self.launch is None else self.launch.to_json(),
            "elapsed_s": round(self.elapsed_s, 6),
        }

    def dumps(self) -> str:
        """`to_json` as one line of text."""
        return json.dumps(self.to_json())
