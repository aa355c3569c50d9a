"""The summary of a run for people: rung and why, launch, exits, conversions, map, result. No more than a screen.

Addresses are hex, sizes in KiB, MiB, GiB; ranges are half-open. Long lists are cut, with a word on how much is missing: all of it is in
`--json`. The keys of the left column are the keys of the JSON object.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from vmm.cli.style import Style
from vmm.cli.values import show_size

if TYPE_CHECKING:
    from vmm.report import LaunchReport, RunReport

MAP_LINES = 12
_RESULT_COLOURS = {"pass": "green", "fail": "red", "error": "red", "timeout": "yellow", "unsupported": "yellow"}


def show(report: RunReport, stream: TextIO, gap: bool = False) -> None:
    """Write the summary; `gap` puts an empty line before it (the guest's console came first)."""
    style = Style(stream)
    lines = [f"{style.paint(f'{key:<11}', 'dim')} {text}" if key else f"{'':<11} {text}" for key, text in _rows(report, style)]
    stream.write("\n" * gap + "\n".join(lines) + "\n")


def _rows(report: RunReport, style: Style) -> Iterator[tuple[str, str]]:
    dialect = "" if report.dialect == "mainline" else f", dialect {report.dialect}"
    yield "guest", f"{style.paint(report.guest, 'bold')}, type {report.type}{dialect}"
    yield "rung", f"{report.rung}: {report.rung_reason}" if report.rung_reason else str(report.rung)
    if report.launch is not None:
        yield from _launch(report.launch, style)
    if report.exits:
        yield "exits", _exits(report.exits)
    if report.type != "plain" or report.conversions:
        yield "conversions", _conversions(report)
        yield from _map(report)
    code = "no exit code" if report.exit_code is None else f"exit code {report.exit_code}"
    yield "result", f"{style.paint(report.result, _RESULT_COLOURS.get(report.result, 'bold'))}, {code}, {report.elapsed_s:.3f} s"


def _launch(launch: LaunchReport, style: Style) -> Iterator[tuple[str, str]]:
    yield "launch", f"policy {launch.policy:#x}{policy_words(launch.policy)}"
    yield "  digest", launch.digest.hex()
    yield "  measure", f"{launch.measure.hex()}  (firmware, nonce {launch.nonce.hex()})"
    verdict = style.paint("match", "green") if launch.match else style.paint("DOES NOT MATCH", "red")
    yield "  expected", f"{launch.expected.hex()}  {verdict}"


def policy_words(policy: int) -> str:
    """The bits of a SEV policy that have a name (SEV API specification, guest policy)."""
    names = ("no debugging", "no key sharing", "SEV-ES", "no migration", "same domain", "SEV platforms only")
    words = [name for bit, name in enumerate(names) if policy >> bit & 1]
    return f" ({', '.join(words)})" if words else ""


def _exits(exits: dict[str, int]) -> str:
    ordered = sorted(exits.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {count}" for name, count in ordered)


def _conversions(report: RunReport) -> str:
    total = max(report.conversions_total, len(report.conversions))
    if total == 0:
        return "none"
    count: Counter[tuple[str, str]] = Counter()
    size: Counter[tuple[str, str]] = Counter()
    for conversion in report.conversions:
        key = (conversion.to, conversion.cause)
        count[key] += 1
        size[key] += conversion.size
    parts = [f"{count[key]} {key[1]} to {key[0]} ({show_size(size[key])})" for key in sorted(count)]
    missing = total - len(report.conversions)
    older = f", {missing} older ones not kept" if missing else ""
    return f"{total}: {', '.join(parts)}{older}"


def _map(report: RunReport) -> Iterator[tuple[str, str]]:
    ranges = list(report.map)
    width = max((len(f"{r.gpa + r.size:x}") for r in ranges), default=1)
    width += width % 2
    for number, r in enumerate(ranges[:MAP_LINES]):
        address = f"[0x{r.gpa:0{width}x}, 0x{r.gpa + r.size:0{width}x})"
        yield ("" if number else "map"), f"{address}  {r.state:<7}  {show_size(r.size):>9}  slot {r.slot}"
    if len(ranges) > MAP_LINES:
        private = sum(r.size for r in ranges if r.state == "private")
        yield "", f"and {len(ranges) - MAP_LINES} more ranges (--json has all); {show_size(private)} private in total"
