"""`Attack`: it notices what a hostile guest costs, what is kept of it, and what happened to the VM beside it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vmm.selftests.api import Failure
from vmm.selftests.case import RunsOn, find_case
from vmm.selftests.fixtures import Fixtures
from vmm.selftests.hostile import attack
from vmm.selftests.hostile.attack import Attack, Bystander

pytestmark = [pytest.mark.gcc, pytest.mark.model]
HARMLESS = '#include "ucall.h"\nunsigned guest_main(const struct boot_info *boot, unsigned vcpu) { (void)boot; (void)vcpu; return 0; }\n'


@pytest.fixture
def fixtures() -> Iterator[Fixtures]:
    with Fixtures(find_case("plain", "mainline", RunsOn(), "model")) as made:
        yield made


def run(fixtures: Fixtures) -> None:
    with Attack(fixtures.machine, HARMLESS, fixtures.note) as one:
        one.bench.done()


def test_a_guest_that_does_nothing(fixtures: Fixtures) -> None:
    run(fixtures)
    (note,) = fixtures.notes
    assert "1 exits" in note and "kept: 0 bytes of console, 0 of 0 conversions" in note


@pytest.mark.parametrize(
    ("limit", "value", "words"),
    [("CPU_BESIDE", -60.0, "of CPU, more than"), ("GROWTH", -(1 << 40), "MiB larger"), ("CONSOLE_LIMIT", -1, "console output are kept")],
)
def test_limits(fixtures: Fixtures, monkeypatch: pytest.MonkeyPatch, limit: str, value: float, words: str) -> None:
    monkeypatch.setattr(attack, limit, value)
    with pytest.raises(Failure, match=words):
        run(fixtures)


def test_the_bystander_notices_its_memory(fixtures: Fixtures) -> None:
    bystander = Bystander(fixtures.machine)
    bystander.check()
    bystander.check()
    bystander.bench.memory.write(0x800000 + 64, b"intruder")
    with pytest.raises(Failure, match="its memory"):
        bystander.check()


def test_the_bystander_notices_conversions(fixtures: Fixtures) -> None:
    bystander = Bystander(fixtures.machine)
    bystander.bench.map.set_range(0x900000, 4096, private=True)
    with pytest.raises(Failure, match="its map"):
        bystander.check()
