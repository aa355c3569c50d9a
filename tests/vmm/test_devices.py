"""Devices: each port answers as the contract says, and none keeps more than it may."""

from types import SimpleNamespace

import pytest

import vmm.devices
from vmm.devices import BOUND_CALLS, CONSOLE_PORT, Console, Devices, EchoDevice, ExitDevice, GuestStop, MmioRegisters, MsrDevice, PortBus


def access(bus: PortBus, port: int, data: bytes, size: int = 1, out: bool = True) -> bytes:
    """One access through what the run loop would bind."""
    buffer = bytearray(data)
    bus.bind(port, size, len(data) // size, memoryview(buffer), out)()
    return bytes(buffer)


@pytest.fixture
def devices() -> Devices:
    return Devices(0xD0000000, 0x40000ABC)


def test_the_console_collects_and_is_always_ready(devices: Devices) -> None:
    for byte in "grüß\n".encode():
        access(devices.ports, CONSOLE_PORT, bytes([byte]))
    access(devices.ports, CONSOLE_PORT, b"rep outsb")
    assert devices.console.text() == "grüß\nrep outsb"
    assert access(devices.ports, 0x3FD, b"\0", out=False) == b"\x60"
    assert access(devices.ports, CONSOLE_PORT, b"x", out=False) == b"\0"


def test_a_sink_gets_lines_and_the_rest_at_the_end() -> None:
    pieces: list[bytes] = []
    console = Console(pieces.append)
    bus = PortBus()
    bus.add(CONSOLE_PORT, console.port)
    for byte in b"one\ntwo":
        access(bus, CONSOLE_PORT, bytes([byte]))
    assert pieces == [b"one\n"]
    console.flush()
    console.flush()
    assert pieces == [b"one\n", b"two"]
    assert console.text() == "one\ntwo"


def test_a_sink_need_not_wait_for_the_end_of_a_line_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(vmm.devices, "time", SimpleNamespace(monotonic=lambda: now[0]))
    pieces: list[bytes] = []
    console = Console(pieces.append)
    bus = PortBus()
    bus.add(CONSOLE_PORT, console.port)
    access(bus, CONSOLE_PORT, b"a")
    now[0] += 0.1
    access(bus, CONSOLE_PORT, b"b")
    assert pieces == []
    now[0] += 0.2
    access(bus, CONSOLE_PORT, b"c")
    assert pieces == [b"abc"]
    access(bus, CONSOLE_PORT, b"d")
    assert pieces == [b"abc"], "its own time has begun"


@pytest.mark.parametrize("sink", [None, lambda data: None])
def test_the_console_keeps_a_bounded_amount_and_says_so(sink: object) -> None:
    console = Console(sink, limit=4 * BOUND_CALLS)  # type: ignore[arg-type]
    bus = PortBus()
    bus.add(CONSOLE_PORT, console.port)
    data = bytearray(b"x")
    for _ in range(6):
        put = bus.bind(CONSOLE_PORT, 1, 1, memoryview(data), True)
        for _ in range(BOUND_CALLS):
            put()
    assert len(console.data) == 4 * BOUND_CALLS
    assert console.dropped == 2 * BOUND_CALLS
    assert "not kept" in console.notes()[0]


def test_string_output_over_the_limit_keeps_the_part_that_fits() -> None:
    console = Console(limit=6)
    console.port(CONSOLE_PORT, 1, 4, memoryview(b"abcd"), True)
    console.port(CONSOLE_PORT, 1, 4, memoryview(b"efgh"), True)
    assert (bytes(console.data), console.dropped) == (b"abcdef", 2)


@pytest.mark.parametrize(("data", "code"), [(b"\0\0\0\0", 0), (b"\x05\x01\0\0", 5), (b"\xff", 255)])
def test_the_exit_device_ends_the_run_with_the_code_modulo_256(data: bytes, code: int) -> None:
    with pytest.raises(GuestStop) as caught:
        ExitDevice().port(0xF4, len(data), 1, memoryview(data), True)
    assert caught.value.code == code


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_echo_port_returns_one_more_of_the_same_width(size: int) -> None:
    echo = EchoDevice()
    echo.port(0xF8, size, 1, memoryview(b"\xff" * size), True)
    seen = bytearray(size)
    echo.port(0xF8, size, 1, memoryview(seen), False)
    assert seen == bytes(size), "it wraps"


def test_string_input_from_the_echo_port_is_the_alphabet() -> None:
    seen = bytearray(8)
    EchoDevice().port(0xF8, 1, 8, memoryview(seen), False)
    assert seen == b"ABCDEFGH"


def test_unknown_ports_read_as_ones_and_are_counted(devices: Devices) -> None:
    assert access(devices.ports, 0x60, b"\0\0\0\0", 4, out=False) == b"\xff" * 4
    access(devices.ports, 0x80, b"\1")
    assert devices.ports.unknown == 2
    assert "2 accesses" in devices.notes()[0]
    with pytest.raises(ValueError, match="0xf4"):
        devices.ports.add(0xF4, devices.console.port)


def test_mmio_registers_remember_bytes() -> None:
    mmio = MmioRegisters(0xD0000000)
    mmio.write(0xD0000008, b"\1\2\3\4")
    assert mmio.read(0xD000000A, 4) == b"\3\4\0\0"
    assert mmio.read(0xD0000040, 4) == b"\xff" * 4
    mmio.write(0xD000003F, b"\1\2")
    assert mmio.read(0xCFFFFFFF, 1) == b"\xff"
    assert mmio.unknown == 3


def test_the_msr_answers_what_was_written_plus_one_and_others_are_refused() -> None:
    msr = MsrDevice(0x40000ABC)
    assert msr.write(0x40000ABC, (1 << 64) - 1)
    assert msr.read(0x40000ABC) == 0
    assert msr.read(0x10) is None
    assert not msr.write(0x10, 1)


def test_a_stage_calls_its_hook_and_only_the_last_ones_are_kept(devices: Devices) -> None:
    seen: list[int] = []
    devices.stage.on_stage = seen.append
    for i in range(600):
        access(devices.ports, 0xF9, bytes([i & 0xFF]))
    assert len(seen) == 600
    assert len(devices.stage.stages) == 256
