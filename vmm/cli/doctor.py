"""`sevmm doctor`: what this host can do, per rung, with the evidence and the remedy.

Exit status 0 when some rung works, 4 when none does: the answer to "can anything run here?".
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Iterator

from vmm.cli import status
from vmm.cli.style import Style
from vmm.doctor import Diagnosis, RungVerdict, examine
from vmm.facts import NO, OK, UNKNOWN

_COLOURS = {OK: "green", NO: "red", UNKNOWN: "yellow"}
_WORDS = {OK: "yes", NO: "no", UNKNOWN: "unknown"}


def run(options: argparse.Namespace) -> int:
    """Examine this host and print the diagnosis."""
    diagnosis = examine()
    if options.json:
        print(json.dumps(diagnosis.to_json(), indent=2))
    else:
        style = Style(sys.stdout)
        width = min(120, shutil.get_terminal_size((110, 24)).columns) if style.terminal else 0
        print("\n".join(lines(diagnosis, style, width)))
    return status.OK if any(rung.state == OK for rung in diagnosis.rungs) else status.UNSUPPORTED


def lines(diagnosis: Diagnosis, style: Style, width: int = 0) -> Iterator[str]:
    """The text: rungs first, then every fact. `width` 0 does not wrap, so that grep sees whole facts."""
    yield style.paint("What can run here", "bold")
    for rung in diagnosis.rungs:
        yield from _entry(style, width, _title(rung), rung.state, f"{rung.reason}\n{rung.remedy}")
    yield ""
    yield style.paint("Facts", "bold")
    for fact in diagnosis.facts:
        if fact.name.startswith("type-"):
            continue  # said by vm-types
        yield from _entry(style, width, fact.title, fact.state, f"{fact.evidence}\n{fact.remedy}")


def _title(rung: RungVerdict) -> str:
    return "software model" if rung.on == "model" else f"{rung.name} on the kernel"


def _entry(style: Style, width: int, title: str, state: str, text: str) -> Iterator[str]:
    """One entry: title, verdict, the first line of `text`, and its second line as the remedy."""
    indent = " " * 38

    def fold(line: str) -> list[str]:
        return textwrap.wrap(line, width - len(indent), break_on_hyphens=False) if width > 60 else [line]

    evidence, _, remedy = text.partition("\n")
    first, *rest = fold(evidence) or [""]
    yield f"  {title:<28}{style.paint(f'{_WORDS[state]:<8}', _COLOURS[state])}{first}"
    yield from (indent + line for line in rest)
    if remedy and state != OK:
        yield from (indent + style.paint(line, "cyan") for line in fold(f"-> {remedy}"))
