"""The cost of one round trip: guest instruction, exit, our handler, back into the guest.

A guest with many round trips and one with few run in turn; the difference of their wall times (the run loop's own clock), divided by the
difference of the counts, is the cost of one round trip without start and end.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchlib import tiny


class GuestFailed(Exception):
    """A guest that is measured did not do what it is measured for."""


@contextmanager
def round_trip(code: Callable[[int], bytes], few: int, many: int, *, type: str, on: str, exit_name: str) -> Iterator[Callable[[], float]]:
    """Gives a call that measures once, in microseconds per round trip."""
    from vmm.run import GuestRequest, run_guest

    def run(path: Path, count: int) -> float:
        report = run_guest(GuestRequest(str(path), type=type, on=on, timeout=120))
        if report.result != "pass" or report.exits.get(exit_name, 0) < count:
            raise GuestFailed(f"{count} round trips on the {on}: {report.result} {report.message}, exits {report.exits}")
        return report.elapsed_s

    with tempfile.TemporaryDirectory() as folder:
        short = tiny.write_elf(Path(folder) / "few.elf", code(few))
        long = tiny.write_elf(Path(folder) / "many.elf", code(many))
        run(short, few)
        yield lambda: (run(long, many) - run(short, few)) / (many - few) * 1e6
