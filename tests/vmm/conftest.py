"""What the VMM's tests share."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def engine_is_warm() -> None:
    """What the model keeps for the whole process is there before a test looks for leaks: the engine's page of native code, and the
    secret memory that holds the root key of its platforms.
    """
    from tests.conftest import missing

    if missing("model") is None:
        from kvmapi.model.host import ModelHost
        from tests.vmm import flat
        from vmm.config import MachineConfig
        from vmm.machine import Machine

        with Machine(MachineConfig(flat.image(flat.HALT), ModelHost(), "sev", memory=16 << 20)) as machine:
            machine.run(10)
