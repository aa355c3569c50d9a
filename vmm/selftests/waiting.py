"""Waiting for something that a running guest, or another thread, brings about."""

from __future__ import annotations

import time
from collections.abc import Callable

from vmm.selftests.checks import Failure

_PAUSE = 0.0002  # seconds: short beside a guest's start, long enough to let it run


def wait_until(condition: Callable[[], object], patience: float, what: str) -> None:
    """Return when `condition()` is true; a failure that says `what` did not happen after `patience` seconds.

    >>> wait_until(lambda: True, 1, "nothing")
    """
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            raise Failure(f"{what}: not within {patience:g} s")
        time.sleep(_PAUSE)
