"""What tests of SEV's commands start from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.model.sev_vm import Family, Sev


@pytest.fixture
def vm(model_host: Any, no_leaks: None) -> Iterator[Sev]:
    """A VM of type SEV, not initialised, that leaves nothing behind."""
    with Sev(model_host) as made:
        yield made


@pytest.fixture
def family(model_host: Any) -> Iterator[Family]:
    """VMs that share encryption contexts; in the end the firmware has no guest."""
    made = Family(model_host)
    assert made.firmware
    with made.all:
        yield made
    assert made.firmware.guest_count == 0, "guests left behind"
