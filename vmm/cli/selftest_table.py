"""The table of `sevmm selftest`: tests down, (rung, case) across, never wider than there is room for.

All results in one table where that fits. Where it does not, each suite has a table of its own with the columns that its tests
have, which are few; and where even those are too many, its columns come in bands, one below the other, each with those tests
that have a result in it. Nothing is left out: every result is in exactly one cell.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

from vmm.cli.style import is_terminal
from vmm.selftests import report
from vmm.selftests.execute import Result
from vmm.selftests.report import Column
from vmm.selftests.subtests import FAIL, PASS, SKIP

COLOURS = {PASS: "green", FAIL: "red", SKIP: "yellow"}
ROOM_ELSEWHERE = 120
"""Columns of text where stdout is no terminal and COLUMNS says nothing: a log, a pipe."""

_WORDS = {PASS: "ok", FAIL: "FAIL", SKIP: "skip"}
_GAP = "  "
Row = tuple[str, str, dict[Column, Result]]
Paint = Callable[[str, str], str]


def room(stream: TextIO) -> int:
    """Columns of text that a line on `stream` may have."""
    if is_terminal(stream):
        return max(shutil.get_terminal_size((80, 24)).columns, 20)
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isascii() and columns.isdigit() and int(columns) >= 20 else ROOM_ELSEWHERE


def lines(results: Sequence[Result], width: int, paint: Paint) -> Iterator[str]:
    """The table, no line wider than `width` but for a single column that is. `paint(text, colour)` dresses what stands in it."""
    rows = list(report.rows(results))
    heads = report.columns(results)
    names = _names_width(rows)
    if names + _width(heads) <= width:
        yield from _band(rows, heads, names, paint, "")
        return
    for number, suite in enumerate(dict.fromkeys(suite for suite, _, _ in rows)):
        mine = [result for result in results if result.suite == suite]
        own = list(report.rows(mine))
        names = _names_width(own)
        for start, band in _bands(report.columns(mine), width - names):
            if number or start:
                yield ""
            shown = [row for row in own if any(head in row[2] for head in band)]
            yield from _band(shown, band, names, paint, suite)


def _bands(heads: Sequence[Column], width: int) -> Iterator[tuple[int, list[Column]]]:
    """The columns in as few pieces as fit into `width`, with the place of their first one."""
    band: list[Column] = []
    for at, head in enumerate(heads):
        if band and _width([*band, head]) > width:
            yield at - len(band), band
            band = []
        band.append(head)
    yield len(heads) - len(band), band


def _band(rows: Sequence[Row], heads: Sequence[Column], names: int, paint: Paint, suite: str) -> Iterator[str]:
    """One table; `suite`: the only one in it, which stands at its head, or empty: each has a line."""
    widths = [_cell_width(head) for head in heads]
    for part in range(2):
        title = suite if part == 1 else ""
        cells = _GAP.join(f"{head[part] or '-':<{width}}" for head, width in zip(heads, widths)).rstrip()
        yield f"{paint(title, 'bold') if title else ''}{' ' * (names - len(title))}{paint(_GAP + cells, 'dim')}"
    before = suite
    for name, test, found in rows:
        if name != before:
            yield paint(name, "bold")
            before = name
        words = []
        for head, width in zip(heads, widths):
            result = found.get(head)
            word = f"{_WORDS[result.result] if result else '':<{width}}"
            words.append(paint(word, COLOURS[result.result]) if result else word)
        yield f"  {test:<{names - 2}}{_GAP}{_GAP.join(words)}".rstrip()


def _names_width(rows: Sequence[Row]) -> int:
    return max((max(len(f"  {test}"), len(suite)) for suite, test, _ in rows), default=0)


def _width(heads: Sequence[Column]) -> int:
    return sum(len(_GAP) + _cell_width(head) for head in heads)


def _cell_width(head: Column) -> int:
    return max(len(head[0] or "-"), len(head[1]), 4)
