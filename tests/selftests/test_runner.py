"""Worker processes: what happens to an item that hangs, dies or prints, to those after it, and on Ctrl-C."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.conftest import PATIENCE, open_fds
from vmm.selftests import collect, runner
from vmm.selftests.execute import Result

SAMPLES = "tests.selftests.samples"

pytestmark = pytest.mark.model


def run(*patterns: str, jobs: int | None = 2, timeout: float | None = None) -> dict[str, Result]:
    items, _ = collect.select(patterns, package=SAMPLES)
    return {f"{r.suite}.{r.test}[{r.type}]": r for r in runner.run(items, "model", jobs, timeout, SAMPLES)}


def children() -> set[int]:
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def test_every_item_has_a_result_whatever_the_others_do() -> None:
    found = run()
    assert set(found) == {item.id for item in collect.select(package=SAMPLES)[0]}
    passed = {name for name, result in found.items() if result.result == "pass"}
    assert passed == {"good.types[plain]", "good.types[sev]", "good.parts[plain]", "bad.last[plain]"}


def test_a_process_that_dies_is_reported_with_its_signal_and_last_words() -> None:
    found = run("dies", "exits", "last", jobs=1)
    died = found["bad.dies[plain]"]
    assert died.result == "fail" and died.text.startswith("the process died by SIGSEGV") and "last words" in died.text
    assert found["bad.exits[plain]"].text.startswith("the process ended with exit code 3")
    assert found["bad.last[plain]"].result == "pass"


def test_an_item_whose_time_is_over_is_killed_and_tells_where_it_was() -> None:
    began = time.monotonic()
    hung = run("hangs", jobs=1)["bad.hangs[plain]"]
    assert time.monotonic() - began < 20 * PATIENCE
    assert hung.result == "fail" and hung.timed_out and hung.text.startswith("did not end within 0.3 s")
    assert "in test_hangs" in hung.text, "the stack of the worker at its time limit"


@pytest.mark.parametrize("jobs", [0, 1, 3])
def test_number_of_processes(jobs: int) -> None:
    before = children()
    processes = set()
    items, _ = collect.select(["good"], package=SAMPLES)
    for _ in runner.run(items, "model", jobs, None, SAMPLES):
        processes |= children() - before
    assert len(processes) == jobs


def test_no_worker_and_no_fd_is_left_when_the_run_is_interrupted() -> None:
    processes, fds = children(), open_fds()
    items, _ = collect.select(["good", "hangs"], package=SAMPLES)
    running = runner.run(items, "model", 2, None, SAMPLES)
    next(running)
    assert children() != processes
    with pytest.raises(KeyboardInterrupt):
        running.throw(KeyboardInterrupt)
    assert children() == processes
    assert open_fds() == fds


def test_workers_run_side_by_side() -> None:
    """A hanging item does not keep the others waiting."""
    items, _ = collect.select(["hangs", "good", "last"], package=SAMPLES)
    order = [result.test for result in runner.run(items, "model", 2, None, SAMPLES)]
    assert order.index("hangs") > 0 and len(order) == len(items)


def test_the_limit_of_a_run_counts_for_all_its_tests() -> None:
    hung = run("hangs", jobs=1, timeout=0.1)["bad.hangs[plain]"]
    assert hung.text.startswith("did not end within 0.1 s")
