"""The rules of random VMMs: every action with the ranges of its numbers, how often a long run takes it, and on which VM.

The property test and `scripts/fuzz sev` read this table, so what the one can find is what the other looks for.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from tests.model import sev_actions as actions
from tests.model import sev_actions_migration as migration
from tests.model.sev_reference_launch import RECEIVE, RUNNING, SECRET, SEND, UPDATE
from tests.model.sev_twist import VALUES
from tests.model.sev_world import ANY, World

VM = 7  # numbers above the VMs that exist wrap around


class Rule(NamedTuple):
    """A function, the highest value of each of its numbers, its share of a long run, and the state that a guest should have for it."""

    call: Callable[..., None]
    most: tuple[int, ...]
    weight: int
    state: int | None = None


_T = (actions.TWIST, VALUES - 1)
RULES: dict[str, Rule] = {
    "create": Rule(actions.create, (5,), 4),
    "ready": Rule(actions.ready, (1, 38, 4), 6),
    "flight": Rule(migration.flight, (1, 38, 3), 4),
    "relative": Rule(migration.relative, (VM, 1), 6, ANY),
    "close": Rule(actions.close, (VM,), 4),
    "vcpu": Rule(actions.vcpu, (VM,), 3),
    "run": Rule(actions.run, (VM,), 1),
    "initialise": Rule(actions.initialise, (VM, 5, *_T), 4),
    "start": Rule(actions.start, (VM, 38, 7, 15, 18, *_T), 8),
    "update": Rule(actions.update, (VM, 10, 11, *_T), 8, UPDATE),
    "vmsa": Rule(actions.vmsa, (VM, *_T), 3, UPDATE),
    "measure": Rule(actions.measure, (VM, 6, *_T), 5, UPDATE),
    "secret": Rule(actions.secret, (VM, 10, 11, 13, *_T), 8, SECRET),
    "finish": Rule(actions.finish, (VM, *_T), 4, SECRET),
    "status": Rule(actions.status, (VM, *_T), 2),
    "report": Rule(actions.report, (VM, 5, *_T), 2),
    "debug": Rule(actions.debug, (VM, 1, 21, 10, 11, *_T), 10),
    "send_start": Rule(migration.send_start, (VM, 14, 4, *_T), 5, RUNNING),
    "send_update": Rule(migration.send_update, (VM, 10, 11, *_T), 8, SEND),
    "send_end": Rule(migration.send_end, (VM, 1), 2, SEND),
    "receive_start": Rule(migration.receive_start, (VM, 5, 12, 9, 15, *_T), 5),
    "receive_update": Rule(migration.receive_update, (VM, 9, 10, 12, *_T), 8, RECEIVE),
    "receive_finish": Rule(migration.receive_finish, (VM,), 2, RECEIVE),
    "share": Rule(migration.share, (VM, VM, 1, 15), 4),
    "region": Rule(actions.region, (VM, 3, 3, 3, *_T), 5, ANY),
    "unknown": Rule(actions.unknown, (VM, 10, *_T), 1),
    "limit": Rule(actions.limit, (3,), 1),
    "keys": Rule(actions.keys, (2,), 1),
    "device": Rule(actions.device, (2, 2), 1),
}
NEEDS_NO_VM = {"create", "ready", "flight", "limit", "keys", "device"}


def take(w: World, name: str, numbers: tuple[int, ...]) -> None:
    """Follow a rule; one that needs a VM does nothing where there is none."""
    made = RULES[name]
    if not w.fds and name not in NEEDS_NO_VM:
        return
    if made.state is not None:
        numbers = (w.suited(numbers[0], made.state), *numbers[1:])
    made.call(w, *numbers)


def numbers(rng: Random, name: str) -> tuple[int, ...]:
    """Numbers for a rule: the first, a VM as a rule, evenly; the others leaning towards what is plain."""
    first, *rest = RULES[name].most
    return (rng.randint(0, first), *(min(rng.randint(0, most), rng.randint(0, most)) for most in rest))


def sequence(rng: Random, steps: int) -> list[tuple[str, tuple[int, ...]]]:
    """So many rules with their numbers, by weight."""
    names = rng.choices(list(RULES), [made.weight for made in RULES.values()], k=steps)
    return [(name, numbers(rng, name)) for name in names]


def follow(rng: Random, steps: int) -> World:
    """A world in which a random sequence was followed; still open. Broken when it went wrong, with the world disposed of."""
    world = World()
    try:
        for name, given in sequence(rng, steps):
            take(world, name, given)
    except BaseException:
        world.dispose()
        raise
    return world
