"""What is known of each selftest, and what a run of it under `sevmm exec` therefore means.

The facts are in exec_selftests.toml: which tests must pass (`named`), which skip or fail for a reason that is known (`exec`), and how real
kvm_amd did in the lab (`lab`). A test with no line is expected to pass; one that this file has never heard of may skip as well.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from lablib.words import Failure

FACTS = Path(__file__).with_name("exec_selftests.toml")
_RANK = {"pass": 0, "skip": 1, "fail": 2, "hang": 2}


@dataclass(frozen=True)
class Outcome:
    """What one run of a test did. `verdict`: pass, skip, fail or hang (over its limit); `reason`: one line."""

    test: str
    verdict: str
    seconds: float
    reason: str = ""


@dataclass(frozen=True)
class Judged:
    """An outcome beside what was expected. `expected` "any": the facts do not know the test; `why`: the reason of a known skip or fail."""

    outcome: Outcome
    expected: str
    why: str
    named: bool
    lab: str = ""

    @property
    def bad(self) -> bool:
        """Worse than it should be."""
        if self.named:
            return self.outcome.verdict != "pass"
        return _RANK[self.outcome.verdict] > _RANK["skip" if self.expected == "any" else self.expected]

    @property
    def better(self) -> bool:
        """Better than the facts say: they are to be changed."""
        return self.expected != "any" and _RANK[self.outcome.verdict] < _RANK[self.expected]

    @property
    def note(self) -> str:
        """What stands behind the verdicts in the table."""
        if self.better:
            return f"better than its line in {FACTS.name}: {self.expected}: {self.why}"
        if self.outcome.verdict == "pass" or self.bad:
            return self.outcome.reason
        return self.why or self.outcome.reason

    def as_json(self) -> dict[str, object]:
        o = self.outcome
        known = {"expected": self.expected, "why": self.why or None, "named": self.named, "lab": self.lab or None}
        return {"test": o.test, "verdict": o.verdict, "seconds": o.seconds, "reason": o.reason, **known, "ok": not self.bad}


class Facts:
    """The file, checked."""

    def __init__(self, path: Path = FACTS, kept: dict[str, str] | None = None) -> None:
        """`kept`: verdicts of the lab's last runs, which go before the file's. `Failure` where the file is not as it should be."""
        try:
            data = tomllib.loads(path.read_text())
            self.named: tuple[str, ...] = tuple(data["named"])
            self.known = {test: self._split(test, line) for test, line in data["exec"].items()}
            self._lab: dict[str, str] = {**data["lab"], **(kept or {})}
        except OSError as error:
            raise Failure(f"{path} cannot be read: {(error.strerror or str(error)).lower()}") from error
        except (KeyError, AttributeError, TypeError, tomllib.TOMLDecodeError) as error:
            raise Failure(f"{path}: {error!r}") from error
        strange = [test for test in (*self.named, *self.known) if test not in data["lab"]]
        if both := [test for test in self.named if test in self.known]:
            raise Failure(f"{path}: {', '.join(both)} must pass, and yet has a line that says why not")
        if strange:
            raise Failure(f"{path}: no such test: {', '.join(strange)}")

    @staticmethod
    def _split(test: str, line: str) -> tuple[str, str]:
        verdict, colon, why = line.partition(": ")
        if verdict not in ("skip", "fail") or not colon or not why:
            raise Failure(f'{test} = "{line}": write "skip: why" or "fail: why"')
        return verdict, why

    @property
    def tests(self) -> list[str]:
        """The names that it knows, sorted."""
        return sorted(self._lab)

    def judge(self, outcome: Outcome) -> Judged:
        """`outcome` beside what is known of its test."""
        known = outcome.test in self._lab
        expected, why = self.known.get(outcome.test, ("pass" if known else "any", ""))
        return Judged(outcome, expected, why, outcome.test in self.named, self._lab.get(outcome.test, ""))

    def seconds(self, test: str) -> float:
        """How long it took in the lab; unknown ones count as long."""
        try:
            return float(self._lab[test].split()[1])
        except (KeyError, IndexError, ValueError):
            return 60.0
