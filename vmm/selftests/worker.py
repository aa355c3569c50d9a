"""The process that runs items for the runner: one JSON line in per item; an empty line out when it begins, and one with the result.

A process of its own, because a test may hang in a system call, die by a signal, or leave the process in a state that the next test should
not see. What a test prints goes to the file that the runner gave as stdout and stderr, not into the answers.

Invariants: it ends when the runner ends (death signal, end of its input); before a time limit is over the stacks of all threads are written
to stderr, so that the runner can tell where it hung.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import json
import os
import signal
import sys
from typing import Any

from vmm.selftests.collect import Item
from vmm.selftests.execute import execute

_PR_SET_PDEATHSIG = 1
START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from vmm.selftests.worker import main; main(int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))"
)
"""Python source that starts a worker: arguments are sys.path as JSON, the fds to read from and write to, and the runner's pid."""


def main(questions: int, answers: int, runner: int) -> None:
    """Answer until the input ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != runner:  # it ended before the line above
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the runner decides what Ctrl-C means
    faulthandler.enable()
    with open(questions, encoding="utf-8") as asked, open(answers, "w", encoding="utf-8") as answered:
        for line in asked:
            answered.write("\n")
            answered.flush()
            answered.write(json.dumps(_answer(json.loads(line))) + "\n")
            answered.flush()


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    item = Item(**question["item"])
    limit = float(question["limit"])
    if limit:
        faulthandler.dump_traceback_later(limit)
    try:
        result = execute(item, question["on"], question["package"])
    finally:
        faulthandler.cancel_dump_traceback_later()
    sys.stdout.flush()
    gc.collect()  # what a test left to the collector (a model with its guests' memory) must not pile up
    return result.to_json()
