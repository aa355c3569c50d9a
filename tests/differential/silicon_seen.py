"""A disagreement between the model and the processor, as the rules of silicon_known.py look at it."""

from __future__ import annotations

from typing import Any, NamedTuple

from tests.differential.opcodes import Decoded, decode
from tests.differential.silicon import Result, Snippet

Differing = dict[str, tuple[Any, Any]]
"""Name -> (model's, processor's)"""
BR, UD, NP, SS, GP, PF, AC = 5, 6, 11, 12, 13, 14, 17
_PADDING = b"\xcc" * 5  # what stands behind a snippet


class Seen(NamedTuple):
    """`parts` is the instruction at which the processor was stopped, or else the model, or else the last: `code`, at `at`.
    `parsed` are all of them.
    """

    parts: Decoded
    code: bytes
    at: int
    parsed: tuple[Decoded, ...]
    differing: Differing
    snippet: Snippet
    ends: tuple[Result, Result]

    @property
    def vectors(self) -> tuple[int, int]:
        """The model's and the processor's."""
        return self.ends[0].stop.vector, self.ends[1].stop.vector

    def made(self, name: str) -> Any:
        """A field of the model's end."""
        return self.ends[0].fields[name]

    def real(self, name: str) -> Any:
        """A field of the processor's end."""
        return self.ends[1].fields[name]

    def stopped(self, *vectors: int) -> bool:
        """Did the processor stop at the instruction with one of these, and the model not do the same?"""
        here = self.real("rip") == self.at and self.vectors[1] in vectors
        return here and (self.made("rip"), self.vectors[0]) != (self.at, self.vectors[1])


def look(snippet: Snippet, differing: Differing) -> Seen:
    """What the rules get to see of a snippet that was judged."""
    assert snippet.ended is not None
    at, starts = snippet.entry, []
    for _, code in snippet.parts:
        starts.append(at)
        at += len(code)
    stops = [end.fields["rip"] for end in reversed(snippet.ended) if end.stop.vector != 3 and end.fields["rip"] in starts]
    which = starts.index(stops[0]) if stops else len(starts) - 1
    parsed = tuple(decode(code + _PADDING, snippet.bits) for _, code in snippet.parts)
    return Seen(parsed[which], snippet.parts[which][1], starts[which], parsed, differing, snippet, snippet.ended)


def all_if(condition: object, seen: Seen) -> set[str]:
    """Everything that differs, or nothing."""
    return set(seen.differing) if condition else set()
