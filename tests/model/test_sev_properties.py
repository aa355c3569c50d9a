"""Random SEV commands of several VMs, compared call by call with a reference that was written from the kernel's source.

The reference is in sev_reference*.py, what a VMM may do in sev_rules.py, the comparison in sev_world.py, and three sentences that need no
reference in sev_invariants.py. `scripts/fuzz sev` runs the same rules for as long as one likes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from kvmapi.abi import psp
from kvmapi.model.sev.guest import GuestContext
from kvmapi.model.sev.status import FirmwareError
from tests.model.sev_arena import SCRATCH, Arena
from tests.model.sev_invariants import Invariants, Violated
from tests.model.sev_rules import NEEDS_NO_VM, RULES, follow, numbers, take
from tests.model.sev_world import Broken, World

pytestmark = pytest.mark.model


class Commands(RuleBasedStateMachine):
    """One world; its rules are made from the table below this class."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self._broken = False

    def take(self, name: str, given: tuple[int, ...]) -> None:
        try:
            take(self.world, name, given)
        except BaseException:
            self._broken = True
            raise

    def teardown(self) -> None:
        if self._broken:
            self.world.dispose()
        else:
            self.world.close()


def _rule(name: str) -> Callable[..., None]:
    def step(self: Commands, given: tuple[int, ...]) -> None:
        self.take(name, given)

    step.__name__ = name
    made: Callable[..., None] = rule(given=st.tuples(*(st.integers(0, most) for most in RULES[name].most)))(step)
    return made if name in NEEDS_NO_VM else precondition(lambda self: bool(self.world.fds))(made)


for _name in RULES:
    setattr(Commands, _name, _rule(_name))

TestCommands = Commands.TestCase
TestCommands.settings = settings(
    max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)


@pytest.mark.parametrize("seed", range(3))
def test_long_sequences(seed: int, no_leaks: None) -> None:
    """What hypothesis seldom reaches: guests on their way, and moved, with many calls before. Nothing is left open."""
    world = follow(random.Random(seed), 250)
    world.close()
    assert world.good > 30


def test_sequences_reach_what_they_are_for() -> None:
    """Over a few seeds each command succeeds somewhere and is refused by the firmware somewhere; else the rules are blind."""
    answers: set[str] = set()
    secrets = 0
    for seed in range(100, 112):
        world = follow(random.Random(seed), 200)
        world.close()
        answers |= set(world.answers)
        secrets += world.invariants.secrets
    for name in (
        "LAUNCH_START", "LAUNCH_UPDATE_DATA", "LAUNCH_UPDATE_VMSA", "LAUNCH_MEASURE", "LAUNCH_SECRET", "LAUNCH_FINISH", "SEND_START",
        "SEND_UPDATE_DATA", "SEND_FINISH", "RECEIVE_START", "RECEIVE_UPDATE_DATA", "RECEIVE_FINISH", "DBG_DECRYPT", "DBG_ENCRYPT",
        "GET_ATTESTATION_REPORT",
    ):  # fmt: skip
        assert {f"KVM_SEV_{name} 0", f"KVM_SEV_{name} EIO"} <= answers, name
    assert {"COPY 0", "MOVE 0", "COPY EINVAL", "MOVE EINVAL", "region 0", "region ENOMEM", "KVM_SEV_GUEST_STATUS EBADF"} <= answers
    assert secrets > 5


def broken(monkeypatch: pytest.MonkeyPatch, name: str, replacement: Any) -> str:
    """What is found when a method of the firmware's guest is another; "" for nothing."""
    monkeypatch.setattr(GuestContext, name, replacement)
    for seed in range(30):
        try:
            follow(random.Random(seed), 200).dispose()
        except Broken as found:
            return str(found)
    return ""


def _without_state(name: str) -> Callable[..., Any]:
    """The method as if the guest were in every state at once."""
    right = getattr(GuestContext, name)

    def wrong(self: GuestContext, *arguments: Any) -> Any:
        require = GuestContext.require
        GuestContext.require = lambda self, *states: None  # type: ignore[method-assign]
        try:
            return right(self, *arguments)
        finally:
            GuestContext.require = require  # type: ignore[method-assign]

    return wrong


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("launch_secret", "LAUNCH_SECRET"),
        ("finish", "LAUNCH_FINISH"),
        ("receive_update_data", "RECEIVE_UPDATE_DATA"),
        ("attestation_report", "GET_ATTESTATION_REPORT"),
    ],
)
def test_a_firmware_that_forgets_states_is_found(monkeypatch: pytest.MonkeyPatch, name: str, words: str) -> None:
    assert words in broken(monkeypatch, name, _without_state(name))


def test_a_firmware_without_states_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "error should be of [2" in broken(monkeypatch, "require", lambda self, *states: None)


def test_a_firmware_that_debugs_everybody_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "DBG_" in broken(monkeypatch, "_debuggable", lambda self, address, size: None)


def test_a_firmware_that_encrypts_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvmapi.model.mem.cipher import PageCipher

    monkeypatch.setattr(PageCipher, "encrypt", lambda self, address, plain: bytes(plain))
    found = broken(monkeypatch, "forget", GuestContext.forget)
    assert "in the clear" in found or "the plaintext" in found


def test_a_firmware_that_changes_state_before_it_fails_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def finish(self: GuestContext) -> None:
        before, self.state = self.state, 3
        if before != 2:
            raise FirmwareError(psp.SEV_RET_INVALID_GUEST_STATE)

    assert "state" in broken(monkeypatch, "finish", finish)


def test_a_firmware_that_takes_any_packet_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvmapi.model.sev.transport import Transport

    monkeypatch.setattr(Transport, "check_packet", lambda *_: None)
    found = broken(monkeypatch, "forget", GuestContext.forget)
    assert "LAUNCH_SECRET" in found or "RECEIVE_UPDATE" in found


def test_asids_that_are_not_given_back_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvmapi.model.sev.firmware import Firmware

    monkeypatch.setattr(Firmware, "decommission", lambda self, guest: None)
    found = broken(monkeypatch, "forget", GuestContext.forget)
    assert "guests, platform" in found


def test_the_three_sentences() -> None:
    """Each is violated by the call that breaks it, and by no other."""
    seen = Invariants()
    seen.saw(6, True, 1, 0)
    seen.saw(5, True, 1, 0)
    seen.saw(6, False, 1, 0)
    seen.saw(17, True, 1, 0)
    seen.saw(17, False, 2, 1)
    for command, handle, policy in ((6, 1, 0), (5, 2, 0), (17, 2, 1), (18, 2, 5)):
        with pytest.raises(Violated):
            seen.saw(command, True, handle, policy)
    seen.saw(7, True, 1, 0)
    with pytest.raises(Violated, match="running"):
        seen.saw(5, True, 1, 0)


def test_the_arena_sees_every_change() -> None:
    arena = Arena(2)
    before = arena.snapshot()
    arena.write(arena.guest[1] + 5, b"x")
    assert arena.changed(before, []) == [arena.guest[1]]
    assert arena.changed(before, [(arena.guest[1] + 5, 1)]) == []
    assert arena.changed(before, [(arena.guest[1] + 6, 100)]) == [arena.guest[1]]
    assert (
        not arena.readable(arena.scratch + SCRATCH - 1, 2) and arena.readable(arena.readonly, 1) and not arena.writable(arena.readonly, 1)
    )
    arena.close()


def test_numbers_are_of_their_range() -> None:
    rng = random.Random(1)
    for name, made in RULES.items():
        for _ in range(50):
            assert all(0 <= number <= most for number, most in zip(numbers(rng, name), made.most, strict=True))
