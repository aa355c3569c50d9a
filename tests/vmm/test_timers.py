"""The timers count with a clock of the test's own: reload values, modes, latches, the gate of channel 2, the PM timer's width."""

from fractions import Fraction
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.vmm import ports
from vmm.timers import CONTROL, GATE_PORT, PIT_HZ, PM_HZ, PM_PORT, Pit, PmTimer


class Clock:
    """Time in ticks of the 8254, as exact seconds: no tick is lost to rounding."""

    def __init__(self) -> None:
        self.ticks = 0

    def __call__(self) -> Any:
        return Fraction(self.ticks, PIT_HZ)


def start(channel: int, mode: int, value: int) -> tuple[Pit, Clock]:
    clock = Clock()
    pit = Pit(clock)
    clock.ticks = 1000
    ports.write(pit.port, CONTROL, channel << 6 | 0x30 | mode << 1)
    ports.write(pit.port, 0x40 + channel, value & 0xFF)
    ports.write(pit.port, 0x40 + channel, value >> 8)
    return pit, clock


def count(pit: Pit, channel: int) -> int:
    ports.write(pit.port, CONTROL, channel << 6)
    return int.from_bytes(ports.read(pit.port, 0x40 + channel) + ports.read(pit.port, 0x40 + channel), "little")


def test_a_counter_counts_down_and_starts_again_in_mode_2() -> None:
    pit, clock = start(0, 2, 1000)
    clock.ticks = 1000 + 300
    assert count(pit, 0) == 700
    clock.ticks = 1000 + 1300
    assert count(pit, 0) == 700


def test_a_latched_count_stays_until_it_has_been_read() -> None:
    pit, clock = start(0, 2, 0x8000)
    clock.ticks = 1000 + 0x100
    ports.write(pit.port, CONTROL, 0)
    clock.ticks = 1000 + 0x300
    ports.write(pit.port, CONTROL, 0)  # a second latch is ignored
    assert ports.read(pit.port, 0x40) + ports.read(pit.port, 0x40) == b"\x00\x7f"
    assert ports.read(pit.port, 0x40) + ports.read(pit.port, 0x40) == b"\x00\x7d"


def test_0_is_65536() -> None:
    pit, clock = start(0, 2, 0)
    clock.ticks = 1000 + 0xFFFF
    assert count(pit, 0) == 1


def test_read_back_latches_what_it_names() -> None:
    pit, clock = start(1, 2, 0x8000)
    clock.ticks = 1000 + 0x100
    ports.write(pit.port, CONTROL, 0xD4)  # latch the count of channel 1
    clock.ticks = 1000 + 0x300
    assert ports.read(pit.port, 0x41) + ports.read(pit.port, 0x41) == b"\x00\x7f"


def test_channel_2_counts_while_its_gate_is_open_and_shows_its_end_at_port_61() -> None:
    pit, clock = start(2, 0, 0x1000)
    clock.ticks += 0x2000
    assert not ports.read(pit.gate, GATE_PORT)[0] & 0x21, "the gate is closed at the start: no tick passes"
    ports.write(pit.gate, GATE_PORT, 1)
    clock.ticks += 0xFFF
    assert ports.read(pit.gate, GATE_PORT)[0] & 0x21 == 1
    clock.ticks += 1
    assert ports.read(pit.gate, GATE_PORT)[0] & 0x21 == 0x21
    ports.write(pit.gate, GATE_PORT, 2)
    assert ports.read(pit.gate, GATE_PORT)[0] & 3 == 2


def test_mode_3_is_a_square_wave() -> None:
    pit, clock = start(0, 3, 1000)
    clock.ticks = 1000 + 499
    assert pit.channels[0].output()
    clock.ticks = 1000 + 500
    assert not pit.channels[0].output()
    clock.ticks = 1000 + 1000
    assert pit.channels[0].output()


def test_one_byte_of_a_count_is_enough_where_the_guest_said_so() -> None:
    clock = Clock()
    pit = Pit(clock)
    ports.write(pit.port, CONTROL, 0x14)  # channel 0, LSB only, mode 2
    ports.write(pit.port, 0x40, 100)
    clock.ticks = 30
    assert ports.read(pit.port, 0x40) == b"\x46"


def test_the_power_management_timer_has_24_bits() -> None:
    seconds = [2.0]
    timer = PmTimer(lambda: seconds[0])
    assert int.from_bytes(ports.read(timer.port, PM_PORT, 4), "little") == 2 * PM_HZ
    seconds[0] = 10.0
    assert int.from_bytes(ports.read(timer.port, PM_PORT, 4), "little") == 10 * PM_HZ % (1 << 24)


@given(st.lists(st.tuples(st.sampled_from([0x40, 0x41, 0x42, 0x43, 0x61]), st.booleans(), st.integers(0, 255), st.integers(0, 1 << 20))))
def test_no_sequence_of_accesses_is_an_error(accesses: list[tuple[int, bool, int, int]]) -> None:
    clock = Clock()
    pit = Pit(clock)
    for port, out, value, ticks in accesses:
        clock.ticks += ticks
        handler = pit.gate if port == GATE_PORT else pit.port
        if out:
            ports.write(handler, port, value)
        else:
            assert len(ports.read(handler, port)) == 1
