"""Machines and their run loop: how runs end, on every host that is there, and that nothing is left afterwards."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from kvmapi.exit_types import Exit, Io
from tests.vmm import flat
from vmm.config import ConfigError, MachineConfig
from vmm.devices import BOUND_CALLS
from vmm.machine import Machine
from vmm.rungs import Unsupported

MIB = 1 << 20
pytestmark = pytest.mark.usefixtures("no_leaks")


def config(host: Any, code: bytes, **more: Any) -> MachineConfig:
    more.setdefault("memory", 16 * MIB)
    more.setdefault("hypercalls", host.name == "model")
    return MachineConfig(image=flat.image(code), host=host, **more)


@pytest.mark.parametrize("code", [0, 1, 255])
def test_the_guests_code_is_the_result(any_host: Any, code: int) -> None:
    with Machine(config(any_host, flat.load("rax", code) + flat.exit_with_eax())) as machine:
        outcome = machine.run(10)
    assert (outcome.result, outcome.exit_code, outcome.exits) == ("fail" if code else "pass", code, {"IO": 1})


@pytest.mark.parametrize("code", [flat.SPIN, flat.SPIN_ON_EXITS, flat.SPIN_IN_HYPERCALL], ids=["computes", "exits", "stuck in KVM_RUN"])
def test_a_guest_that_does_not_end_is_stopped_at_the_deadline(any_host: Any, code: bytes) -> None:
    with Machine(config(any_host, code, vcpus=2)) as machine:
        began = time.monotonic()
        outcome = machine.run(0.2)
        elapsed = time.monotonic() - began
    assert outcome.result == "timeout"
    assert outcome.exit_code is None
    assert "0.2 s" in outcome.message
    assert 0.19 < elapsed < 2


def test_it_works_where_python_repeats_interrupted_ioctls(kernel_host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmapi.kernel._FCNTL_RETRIES", True)
    with Machine(config(kernel_host, flat.SPIN)) as machine:
        assert machine.run(0.1).result == "timeout"
    with Machine(config(kernel_host, flat.load("rax", 3) + flat.exit_with_eax())) as machine:
        assert machine.run(10).exit_code == 3


def test_it_works_off_the_main_thread(any_host: Any) -> None:
    results: list[str] = []

    def work() -> None:
        with Machine(config(any_host, flat.SPIN)) as machine:
            results.append(machine.run(0.1).result)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(20)
    assert results == ["timeout"]


def test_a_guest_that_halts_is_an_error(any_host: Any) -> None:
    with Machine(config(any_host, flat.HALT, vcpus=3)) as machine:
        outcome = machine.run(10)
    assert (outcome.result, outcome.message, outcome.exits) == ("error", "the guest halted without an exit code", {"HLT": 3})


def test_a_triple_fault_is_an_error_that_says_so(any_host: Any) -> None:
    with Machine(config(any_host, flat.TRIPLE_FAULT)) as machine:
        outcome = machine.run(10)
    assert outcome.result == "error"
    assert "triple fault" in outcome.message or "INTERNAL_ERROR" in outcome.message


def test_exits_are_counted_over_many_bindings(any_host: Any) -> None:
    count = 2 * BOUND_CALLS + 17
    # mov ecx, count; mov dx, 0x3f8; 1: out dx, al; dec ecx; jnz 1b; xor eax, eax; out 0xf4, eax
    code = b"\xb9" + count.to_bytes(4, "little") + b"\x66\xba\xf8\x03\xb0\x78\xee\xff\xc9\x75\xfb\x31\xc0"
    with Machine(config(any_host, code + flat.exit_with_eax())) as machine:
        outcome = machine.run(30)
        assert outcome.exits == {"IO": count + 1}
        assert len(machine.devices.console.data) == count


def test_more_kinds_of_access_than_are_remembered(any_host: Any) -> None:
    # mov edx, 0x1000; 1: in al, dx; cmp al, 0xff; jne 2f; inc edx; cmp edx, 0x1000 + 700; jne 1b
    # 2: sub edx, 0x1000 + 700; mov eax, edx; out 0xf4, eax
    top = (0x1000 + 700).to_bytes(4, "little")
    code = b"\xba\x00\x10\x00\x00" + b"\xec\x3c\xff\x75\x0a\xff\xc2\x81\xfa" + top + b"\x75\xf1" + b"\x81\xea" + top + b"\x89\xd0"
    with Machine(config(any_host, code + flat.exit_with_eax())) as machine:
        outcome = machine.run(30)
        assert (outcome.result, outcome.exits) == ("pass", {"IO": 701})
        assert machine.devices.ports.unknown == 700


def test_a_handler_sees_every_exit_and_may_answer_it(any_host: Any) -> None:
    seen: list[Exit] = []

    def handler(vcpu: Any, exit: Exit) -> bool:
        seen.append(exit)
        if isinstance(exit, Io) and exit.port == 0x77:
            vcpu.answer_io(exit, b"\x2a")
            return True
        return False

    code = b"\xe4\x77" + b"\x0f\xb6\xc0" + flat.exit_with_eax()  # in al, 0x77; movzx eax, al; out 0xf4, eax
    with Machine(config(any_host, code)) as machine:
        machine.handlers.append(handler)
        outcome = machine.run(10)
    assert outcome.exit_code == 0x2A
    assert [type(exit) for exit in seen] == [Io, Io]
    assert outcome.exits == {"IO": 2}


@pytest.mark.parametrize("watched", [False, True])
def test_hypercalls_are_answered_alike_whether_somebody_looks_or_not(model_host: Any, watched: bool) -> None:
    """With a handler each exit is an object; without, the run loop gives the dispatcher the numbers."""
    seen: list[Exit] = []
    # 0, -EINVAL (reserved bits), -KVM_ENOSYS: the sum of their negatives is the exit code, modulo 256
    code = flat.hypercall(0x800000, 1, 0x10) + b"\x48\x89\xc6"  # mov rsi, rax
    code += flat.hypercall(0x800000, 1, 0x20) + b"\x48\x01\xc6"  # add rsi, rax
    code += flat.hypercall(0, 0, 0, number=99) + b"\x48\x01\xf0" + flat.NEGATE + flat.exit_with_eax()  # add rax, rsi
    with Machine(config(model_host, code)) as machine:
        if watched:
            machine.handlers.append(lambda _vcpu, exit: bool(seen.append(exit)))
        outcome = machine.run(10)
        assert (outcome.exit_code, outcome.exits) == ((22 + 1000) % 256, {"HYPERCALL": 2, "IO": 1})
        assert machine.converter.total == 1 and machine.converter.map.is_private(0x800000)
        assert machine.dispatcher.refused == 1 and "reserved" in machine.dispatcher.last_refusal
    assert [exit.name for exit in seen] == (["HYPERCALL", "HYPERCALL", "IO"] if watched else [])


def test_what_a_hook_raises_comes_out_after_everything_stopped(any_host: Any) -> None:
    def hook(stage: int) -> None:
        raise ZeroDivisionError(stage)

    with Machine(config(any_host, b"\xb0\x07\xe6\xf9" + flat.SPIN, vcpus=2)) as machine:
        machine.devices.stage.on_stage = hook
        with pytest.raises(ZeroDivisionError, match="7"):
            machine.run(10)


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"memory": 4 * MIB}, "too little"),
        ({"memory": 17 * MIB}, "2 MiB"),
        ({"memory": 1 << 40}, "too much"),
        ({"vcpus": 0}, "1 to 64"),
        ({"vcpus": 65}, "1 to 64"),
        ({"arguments": b"x" * 1024}, "1023"),
        ({"arguments": b"a\0b"}, "NUL"),
        ({"policy": 1}, "means nothing"),
        ({"policy": 1 << 32, "type": "sev"}, "32 bits"),
        ({"lazy_private": True}, "sw-protected"),
        ({"irqchip": True}, "needs type sev-es, not plain"),
        ({"irqchip": True, "type": "sev"}, "needs type sev-es, not sev"),
    ],
)
def test_impossible_machines_are_refused_in_one_sentence(model_host: Any, more: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word) as caught:
        Machine(config(model_host, flat.HALT, **more))
    assert "\n" not in str(caught.value)


def test_more_vcpus_than_the_host_has_is_unsupported(any_host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvmapi.system import System

    monkeypatch.setattr(System, "check_extension", lambda self, cap: 1)
    with pytest.raises(Unsupported, match="allows 1"):
        Machine(config(any_host, flat.HALT, vcpus=2))


def test_memory_above_the_hole(any_host: Any) -> None:
    # mov rbx, 4 GiB + 8; mov qword [rbx], 0x5a; mov rax, [rbx]; out 0xf4, eax
    code = flat.load("rbx", (1 << 32) + 8) + b"\x48\xc7\x03\x5a\x00\x00\x00\x48\x8b\x03" + flat.exit_with_eax()
    with Machine(config(any_host, code, memory=(3 << 30) + 16 * MIB)) as machine:
        assert machine.run(10).exit_code == 0x5A
        assert machine.memory.read((1 << 32) + 8, 1) == b"\x5a"


def test_every_vcpu_gets_its_index_stack_and_apic_id(any_host: Any) -> None:
    # mov [0x900000 + 8*rsi], rsp; CPUID leaf 1, (EBX >> 24) + 1 -> [0x900100 + 4*rsi]; vCPUs but 0 halt;
    # vCPU 0 waits until all others have written theirs, then exits with 0
    code = b"\x48\x89\x24\xf5\x00\x00\x90\x00" + b"\xb8\x01\x00\x00\x00\x0f\xa2\xc1\xeb\x18" + b"\xff\xc3\x89\x1c\xb5\x00\x01\x90\x00"
    code += b"\x48\x85\xf6\x74\x01\xf4" + b"\xf3\x90\x83\x3c\x25\x0c\x01\x90\x00\x00\x74\xf4\x83\x3c\x25\x08\x01\x90\x00\x00\x74\xea"
    code += b"\x83\x3c\x25\x04\x01\x90\x00\x00\x74\xe0\x31\xc0" + flat.exit_with_eax()
    with Machine(config(any_host, code, vcpus=4)) as machine:
        outcome = machine.run(20)
        assert outcome.result == "pass", outcome.message
        stacks = [int.from_bytes(machine.memory.read(0x900000 + 8 * i, 8), "little") for i in range(4)]
        ids = [int.from_bytes(machine.memory.read(0x900100 + 4 * i, 4), "little") - 1 for i in range(4)]
    assert stacks == [0x40000 + 0x2000 * (i + 1) - 8 for i in range(4)]
    assert ids == [0, 1, 2, 3]


def test_ctrl_c_stops_a_guest_that_spins(any_host: Any, tree: Path) -> None:
    program = f"""
from tests.vmm import flat
from vmm.config import MachineConfig
from vmm.machine import Machine
if {any_host.name!r} == "kernel":
    from kvmapi.kernel import KernelHost as Host
else:
    from kvmapi.model.host import ModelHost as Host
with Machine(MachineConfig(flat.image({flat.SPIN_IN_HYPERCALL!r}), Host(), hypercalls=False, vcpus=2)) as machine:
    machine.devices.stage.on_stage = None
    print("running", flush=True)
    machine.run(60)
"""
    child = subprocess.Popen([sys.executable, "-c", program], cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "running\n"
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=20)
    assert child.returncode != 0
    assert errors.rstrip().endswith("KeyboardInterrupt"), errors
