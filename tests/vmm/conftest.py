"""What the VMM's tests share."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def engine_is_warm() -> None:
    """The model's engine keeps one page of native code for the whole process; make it before a test looks for leaks."""
    from tests.conftest import missing

    if missing("model") is None:
        from kvmapi.model.host import ModelHost
        from tests.vmm import flat
        from vmm.machine import Machine, MachineConfig

        with Machine(MachineConfig(flat.image(flat.HALT), ModelHost(), memory=16 << 20)) as machine:
            machine.run(10)
