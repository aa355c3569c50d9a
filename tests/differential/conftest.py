"""The hypothesis profile of these tests: the same examples every time, within a fixed budget; SEVMM_DEEP=N for long, random runs.

With SEVMM_DEEP=20, say, each machine runs 20 times as many sequences, twice as long and different each time; hypothesis prints what is
needed to repeat a failure. SEVMM_SURVEY=1 lists all disagreements instead of failing at the first.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from tests.conftest import require
from tests.differential.pair import SURVEY

SHOWN = 60
DEEP = int(os.environ.get("SEVMM_DEEP", "0"))
"""How many times as many sequences; 0: those of CI."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if SURVEY is not None:
        terminalreporter.section(f"{len(SURVEY)} disagreements")
        for log in sorted(SURVEY.values(), key=lambda log: log[-1]):
            terminalreporter.line(f"E   {log[-1]}   # step {len(log)}")
            for line in log[-SHOWN:-1] if len(SURVEY) <= 10 else ():
                terminalreporter.line(f"        {line}")


@pytest.fixture
def drive(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Run a state machine class: drive(Machine, examples, steps). Skips where no kernel can be compared with."""
    require(request.config, "kvm")
    require(request.config, "model")

    def run(machine: type[RuleBasedStateMachine], examples: int, steps: int, **attributes: Any) -> None:
        for name, value in attributes.items():
            setattr(machine, name, value)
        chosen = settings(
            max_examples=examples * (DEEP or 1),
            stateful_step_count=steps * (2 if DEEP else 1),
            derandomize=not DEEP,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            print_blob=bool(DEEP),
            suppress_health_check=list(HealthCheck),
        )
        run_state_machine_as_test(machine, settings=chosen)

    return run
