"""`sevmm guests`: the bundled guests, each with the property it proves.

A table on a terminal (where rich is installed), aligned lines elsewhere. Guests that fail by design are listed last, marked as samples.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys

from guest import catalogue
from vmm.cli import status
from vmm.cli.style import is_terminal


def names() -> list[str]:
    """The names of all bundled guests, in the catalogue's order."""
    return [guest.name for guest in catalogue.GUESTS]


def run(_options: argparse.Namespace) -> int:
    """Print the table."""
    rich_is_there = is_terminal(sys.stdout) and importlib.util.find_spec("rich") is not None
    (_table if rich_is_there else _lines)()
    return status.OK


def _proves(guest: catalogue.Guest) -> str:
    return f"{guest.proves} (a sample: it does not pass, by design)" if guest.sample else guest.proves


def _lines() -> None:
    rows = [("GUEST", "TYPES", "PROVES"), *((g.name, ",".join(g.types), _proves(g)) for g in catalogue.GUESTS)]
    first = max(len(row[0]) for row in rows)
    second = max(len(row[1]) for row in rows)
    for name, types, proves in rows:
        print(f"{name:<{first}}  {types:<{second}}  {proves}")


def _table() -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", expand=False)
    table.add_column("guest", no_wrap=True, style="cyan")
    table.add_column("types", no_wrap=True, style="dim")
    table.add_column("proves")
    for guest in catalogue.GUESTS:
        table.add_row(guest.name, ", ".join(guest.types), Text(_proves(guest)))
    console = Console(highlight=False)
    console.print(table)
    console.print(Text("run one: sevmm run NAME; the first type is what it takes unless --type says otherwise", style="dim"))
