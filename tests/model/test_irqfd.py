"""irqfds and ioeventfds of the model: their thread, their fds, and callers that do odd things with an eventfd."""

from __future__ import annotations

import errno
import gc
import os
import resource
import signal
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmapi.abi import kvm
from kvmapi.errors import KvmError
from kvmapi.model.caller import Errno
from kvmapi.model.eventfd import own_eventfd
from kvmapi.model.irq.kernel_bus import KernelBus
from tests.conformance.snippets import Machine

LEVEL = 1 << 15
FULL = 2**64 - 2


@pytest.fixture
def machine(model_host: Any) -> Iterator[Machine]:
    with Machine(model_host) as made:
        made.vm.create_irqchip()
        yield made


def high(machine: Machine) -> int:
    """The IOAPIC pins that are high."""
    return int(machine.vm.get_irqchip(kvm.KVM_IRQCHIP_IOAPIC).chip.ioapic.irr)


def until(condition: Any) -> bool:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.0005)
    return False


def watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "sevmm-irqfds"]


def hold(machine: Machine, event: int, pin: int, told: int) -> None:
    """A resampling irqfd on a masked pin: the pin stays high when it is written."""
    machine.vm.irqfd(event, pin, kvm.KVM_IRQFD_FLAG_RESAMPLE, told)


def test_the_thread_ends_with_the_last_irqfd(machine: Machine) -> None:
    assert not watchers()
    events = [os.eventfd(0) for _ in range(3)]
    for pin, event in enumerate(events):
        machine.vm.irqfd(event, pin)
    (thread,) = watchers()
    for pin, event in enumerate(events):
        machine.vm.irqfd(event, pin, kvm.KVM_IRQFD_FLAG_DEASSIGN)
        os.close(event)
    thread.join(10)
    assert not thread.is_alive() and not watchers()


def test_a_blocking_eventfd_that_someone_else_empties(machine: Machine) -> None:
    """The thread must not hang in a read: another irqfd goes on working."""
    first, second, told = (os.eventfd(0) for _ in range(3))
    machine.vm.irqfd(first, 3)
    hold(machine, second, 4, told)
    stop = threading.Event()

    def empty() -> None:
        while not stop.is_set():
            os.eventfd_write(first, 1)
            os.eventfd_read(first)

    thread = threading.Thread(target=empty, daemon=True)
    thread.start()
    time.sleep(0.05)
    os.eventfd_write(second, 1)
    assert until(lambda: high(machine) >> 4 & 1)
    stop.set()
    while thread.is_alive():
        os.eventfd_write(first, 1)
        thread.join(0.01)
    for event in (first, second, told):
        os.close(event)


def test_the_caller_closes_its_fd(machine: Machine) -> None:
    """The irqfd lives on the model's own fd; a dup of the caller's still works."""
    event, told = os.eventfd(0), os.eventfd(0)
    again = os.dup(event)
    hold(machine, event, 4, told)
    os.close(event)
    os.close(told)
    os.eventfd_write(again, 1)
    assert until(lambda: high(machine) == 1 << 4)
    os.close(again)


def test_deassign_lets_go_of_the_line(machine: Machine) -> None:
    event, told = os.eventfd(0), os.eventfd(0)
    hold(machine, event, 4, told)
    os.eventfd_write(event, 1)
    assert until(lambda: high(machine) == 1 << 4)
    machine.vm.irqfd(event, 4, kvm.KVM_IRQFD_FLAG_DEASSIGN)
    assert high(machine) == 0
    os.close(event), os.close(told)


@pytest.mark.parametrize("room", [0, 1, 2])
def test_no_fd_left(machine: Machine, room: int) -> None:
    """EMFILE, and nothing stays behind."""
    gc.collect()
    for thread in threading.enumerate():  # the watcher of an earlier test gives its fds back when it ends
        if thread.name == "sevmm-irqfds":
            thread.join(20)
    event = os.eventfd(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (event + 16, hard))
    filling: list[int] = []
    try:
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                filling.append(os.dup(event))
        for _ in range(room):
            os.close(filling.pop())
        with pytest.raises(KvmError) as raised:
            machine.vm.irqfd(event, 3)
        assert raised.value.errno == errno.EMFILE
        for _ in range(room):
            filling.append(os.dup(event))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in filling:
            os.close(fd)
    machine.vm.irqfd(event, 3)
    os.close(event)


def test_a_full_counter_does_not_block() -> None:
    event = os.eventfd(0)
    os.write(event, struct.pack("<Q", FULL))
    own = own_eventfd(event)
    thread = threading.Thread(target=own.signal, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive() and os.eventfd_read(event) == FULL
    own.consume()
    own.signal()
    own.consume()
    os.set_blocking(event, False)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(event)
    os.close(event)


def test_keys() -> None:
    one, other = os.eventfd(0), os.eventfd(0)
    again = os.dup(one)
    assert own_eventfd(one).key == own_eventfd(again).key != own_eventfd(other).key
    for fd in (one, other, again):
        os.close(fd)
    for fd, number in ((one, 9), (-1, 9), (1 << 40, 9)):
        with pytest.raises(Errno) as raised:
            own_eventfd(fd)
        assert raised.value.number == number
    reader, writer = os.pipe()
    with pytest.raises(Errno) as raised:
        own_eventfd(reader)
    assert raised.value.number == 22
    os.close(reader), os.close(writer)


def test_a_signalled_ioeventfd_is_taken_off(model_host: Any) -> None:
    """Guest threads write while the VMM assigns and deassigns: no write reaches an fd that was closed and reused."""
    bus = KernelBus()
    event = os.eventfd(0)
    stop = threading.Event()
    failures: list[BaseException] = []

    def guest() -> None:
        try:
            while not stop.is_set():
                bus.write("mmio", 0xD0000000, bytes(4))
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=guest) for _ in range(3)]
    for thread in threads:
        thread.start()
    on, off = (struct.pack("<QQIiI36x", 0, 0xD0000000, 4, event, flags) for flags in (0, kvm.KVM_IOEVENTFD_FLAG_DEASSIGN))
    for _ in range(300):
        bus.ioeventfd(on, model_host)
        bus.ioeventfd(off, model_host)
    stop.set()
    for thread in threads:
        thread.join(10)
    bus.destroy()
    os.close(event)
    assert not failures


def test_a_forked_child(machine: Machine) -> None:
    """It gets EIO, its death takes nothing away, and the parent's irqfds go on."""
    event, told = os.eventfd(0), os.eventfd(0)
    hold(machine, event, 4, told)
    child = os.fork()
    if not child:
        try:
            machine.vm.irq_line(3, 1)
        except KvmError as failure:
            os._exit(failure.errno)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
    os.eventfd_write(event, 1)
    assert until(lambda: high(machine) == 1 << 4)
    os.close(event), os.close(told)


def test_a_forked_child_with_a_vm_of_its_own(machine: Machine, model_host: Any) -> None:
    event = os.eventfd(0)
    machine.vm.irqfd(event, 3)
    child = os.fork()
    if not child:
        with Machine(type(model_host)()) as own:
            own.vm.create_irqchip()
            mine = os.eventfd(0)
            hold(own, mine, 4, event)
            os.eventfd_write(mine, 1)
            os._exit(0 if until(lambda: high(own) == 1 << 4) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(event)


def test_signals_go_to_others(machine: Machine) -> None:
    """The thread has every signal blocked that a vCPU's thread could be looking for."""
    event = os.eventfd(0)
    machine.vm.irqfd(event, 3)
    (thread,) = watchers()
    status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
    (blocked,) = (int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigBlk:"))
    for number in (signal.SIGALRM, signal.SIGUSR1, signal.SIGINT, signal.SIGRTMIN):
        assert blocked >> number - 1 & 1
        assert number not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    os.close(event)


def test_the_vm_goes_while_its_eventfd_is_written(model_host: Any) -> None:
    event = os.eventfd(0, os.EFD_NONBLOCK)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            os.eventfd_write(event, 1)

    thread = threading.Thread(target=write)
    thread.start()
    for _ in range(50):
        with Machine(model_host) as made:
            made.vm.create_irqchip()
            made.vm.irqfd(event, 3)
    stop.set()
    thread.join(10)
    os.close(event)
    assert until(lambda: not watchers())
