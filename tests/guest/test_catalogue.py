"""The catalogue's rows fit the sources, and the patterns fit what the guests write."""

from __future__ import annotations

import pytest

from guest import build, catalogue, patterns

TYPES = {"plain", "sw-protected", "sev", "sev-es"}


def test_every_program_has_a_row_and_every_row_a_program() -> None:
    sources = {path.name for path in catalogue.PROGRAMS.iterdir() if path.suffix == ".c"}
    assert {guest.source.name for guest in catalogue.GUESTS} == sources
    assert len({guest.name for guest in catalogue.GUESTS}) == len(catalogue.GUESTS)


@pytest.mark.parametrize("guest", catalogue.GUESTS, ids=lambda guest: guest.name)
def test_row_and_story(guest: catalogue.Guest) -> None:
    assert guest.types and set(guest.types) <= TYPES
    assert guest.needs <= {"hypercall"}
    assert guest.source.read_text().startswith(f"/*\n * {guest.name}: "), "a program begins with its story"
    assert catalogue.find(guest.name) is guest


def test_patterns_are_splitmix64() -> None:
    # splitmix64 seeded with 0 starts with 0xe220a8397b1dcdaf in the authors' reference code
    assert patterns._word(0, 0) == 0xE220A8397B1DCDAF
    assert patterns.pattern_private(8, 16) == patterns.pattern_private(0, 32)[8:24]
    assert patterns.private_marker() == patterns.pattern_private(0, 32)[:16]
    assert len({patterns.pattern_private(0), patterns.pattern_shared(0), patterns.pattern_converted(0)}) == 3


@pytest.mark.parametrize(("offset", "size"), [(4, 8), (0, 12)])
def test_patterns_come_in_words(offset: int, size: int) -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        patterns.pattern_private(offset, size)


@pytest.mark.gcc
def test_private_pattern_is_not_in_the_image() -> None:
    image = build.build("private-memory").read_bytes()
    page = patterns.pattern_private(0, 4096)
    assert not [at for at in range(0, 4096, 8) if page[at : at + 8] in image]
