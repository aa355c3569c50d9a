"""Memory that a VMM takes away from its guest, and may unmap as soon as the ioctl has returned: nothing of the model looks at it again.

Each of these ends the process (SIGSEGV) where something does, so each runs in one of its own.
"""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from kvmapi.abi import kvm
from kvmapi.exits import Io, Shutdown
from kvmapi.model.host import ModelHost
from tests.conformance.snippets import PD_LOW, LongGuest, address_of, code, protect

pytestmark = pytest.mark.model
BEFORE = code("a100000300000000 00 e6 10 f4", "movabs eax, [0x30000]; out 0x10, al; hlt")
TABLE = 0x40000


def gone() -> LongGuest:
    """A guest that has run and whose only slot is deleted, and its memory inaccessible."""
    guest = LongGuest(ModelHost(), BEFORE)
    guest.put(TABLE, struct.pack("<512Q", *(page << 12 | 3 for page in range(512))))  # 4 KiB pages
    guest.put(PD_LOW, struct.pack("<Q", TABLE | 3))
    assert isinstance(guest.run(), Io) and guest.vcpu.translate(0x30000) == 0x30000
    guest.vm.set_user_memory_region(0, 0, 0, 0)
    protect(address_of(guest.memory), len(guest.memory), 0)  # as good as unmapped, and nobody else can be given the addresses
    return guest


def run_on() -> None:
    assert gone().run() == Shutdown(), "neither code nor tables nor a stack"


def translate() -> None:
    assert gone().vcpu.translate(0x30000) is None


def debug() -> None:
    guest = gone()
    control = kvm.KVM_GUESTDBG_ENABLE | kvm.KVM_GUESTDBG_USE_HW_BP
    guest.vcpu.set_guest_debug(control, (0x10000, 0, 0, 0, 0, 0, 0, 0x402))
    assert guest.run() == Shutdown()


@pytest.mark.parametrize("what", [run_on, translate, debug], ids=lambda what: what.__name__)
def test_nobody_looks_at_memory_that_is_gone(what: Callable[[], None]) -> None:
    script = f"import os\nfrom {__name__} import {what.__name__}\n{what.__name__}()\nos._exit(0)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_others_keep_their_translations_when_an_unused_slot_goes(model_host: Any) -> None:
    """Only memory that was in use can have been translated from."""
    with LongGuest(model_host, BEFORE) as guest:
        assert isinstance(guest.run(), Io)
        guest.vm.set_user_memory_region(1, 1 << 30, 0x1000, address_of(guest.memory))
        cpu = model_host._files[guest.vcpu.fd][0].cpu
        pages = dict(cpu.code._pages)
        guest.vm.set_user_memory_region(1, 1 << 30, 0, address_of(guest.memory))
        guest.run()
        assert pages and cpu.code._pages == pages
