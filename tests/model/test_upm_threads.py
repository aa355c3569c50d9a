"""Private slots while everything moves: vCPUs that store, files that are populated and punched, slots that come and go.

Nothing may hang, and no page may be seen half converted: a counter that a guest reads back is one that some guest stored.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from kvmapi.exits import Hlt, Intr, MemoryFault
from tests.conformance.snippets import CODE, PAGE, address_of, code
from tests.model.upm import AT, CALL, LOAD, MARK, STORE, Upm, host

pytestmark = pytest.mark.model
SECONDS = 1.0
PAGES = 4
LOOP = code(
    "4889de b904000000 48ff06 4881c600100000 ffc9 75f2 ebe8",
    "0: mov rsi, rbx; mov ecx, 4; 1: inc qword ptr [rsi]; add rsi, 0x1000; dec ecx; jne 1b; jmp 0b",
)


@pytest.mark.parametrize("type", [0, 2])
@pytest.mark.parametrize("dialect", ["upm-v6", "upm-v7"])
def test_conversions_race_with_guests_and_slots(dialect: str, type: int, no_leaks: None) -> None:
    failures: list[BaseException] = []
    faults = [0, 0]
    with Upm(host(dialect), type, pages=PAGES, vcpus=2, text=LOOP) as guest:
        if type:
            guest.launch()
        for number in range(2):
            assert guest.says(AT, PAGES, MARK, number) == 0
            guest.regs(number, rip=CODE + len(LOAD + STORE + CALL), rbx=AT)
        over = time.monotonic() + SECONDS

        def run(number: int) -> None:
            vcpu = guest.vcpus[number]
            while True:
                exit_ = vcpu.exit(vcpu.run())
                if isinstance(exit_, Intr):
                    return
                assert isinstance(exit_, MemoryFault) and exit_.private and AT <= exit_.gpa < AT + PAGES * PAGE, exit_
                faults[number] += 1
                (guest.memfd.allocate if dialect == "upm-v6" else guest.vm.register_private)(
                    exit_.gpa - (AT if dialect == "upm-v6" else 0), PAGE
                )

        def punch() -> None:
            while time.monotonic() < over:
                for page in range(PAGES):
                    if dialect == "upm-v7":
                        guest.vm.unregister_private(AT + page * PAGE, PAGE)
                    guest.memfd.punch_hole(page * PAGE, PAGE)
                time.sleep(0.001)

        def slots() -> None:
            other = address_of(guest.shared)
            while time.monotonic() < over:
                guest.vm.set_private_region(11, 2 * AT, PAGE, other, guest.memfd.fd, PAGE)
                guest.vm.set_user_memory_region(11, 2 * AT, 0, 0)

        def caught(work: Callable[[], None]) -> Callable[[], None]:
            def body() -> None:
                try:
                    work()
                except BaseException as failure:
                    failures.append(failure)

            return body

        guests = [threading.Thread(target=caught(lambda number=number: run(number)), daemon=True) for number in range(2)]  # type: ignore[misc]
        others = [threading.Thread(target=caught(work), daemon=True) for work in (punch, slots)]
        for thread in guests + others:
            thread.start()
        for thread in others:
            thread.join(30)
        for vcpu in guest.vcpus:
            vcpu.request_exit()
        for thread in guests:
            thread.join(30)
        assert not any(thread.is_alive() for thread in guests + others)
        assert not failures, failures
        assert all(faults) or sum(faults) > 10
        for vcpu in guest.vcpus:
            vcpu.request_exit(False)
        guest.memfd.allocate(0, PAGES * PAGE)
        if dialect == "upm-v7":
            guest.vm.register_private(AT, PAGES * PAGE)
        guest.memfd.punch_hole(0, PAGE)
        guest.memfd.allocate(0, PAGE)
        assert guest.store(7) == Hlt() and guest.value(vcpu=1) == 7
