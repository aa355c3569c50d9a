"""The serial port: output arrives exactly when it should, and the registers that guests probe with answer like a 16550's."""

from hypothesis import given
from hypothesis import strategies as st

from tests.vmm import ports
from vmm.devices import Console
from vmm.serial import BASE, REGISTERS, Serial

IER, FCR, LCR, MCR, LSR, MSR, SCR = range(BASE + 1, BASE + 8)


def port() -> tuple[Serial, Console]:
    console = Console()
    return Serial(console), console


def test_bytes_to_the_data_register_are_output_but_not_under_dlab() -> None:
    serial, console = port()
    ports.write(serial.port, LCR, 0x83)
    ports.write(serial.port, BASE, 0x0C)
    ports.write(serial.port, IER, 0x01)
    assert (ports.read(serial.port, BASE), ports.read(serial.port, IER)) == (b"\x0c", b"\x01"), "the divisor"
    ports.write(serial.port, LCR, 0x03)
    ports.write(serial.port, BASE, ord("h"))
    ports.write(serial.port, BASE, ord("i"))
    assert console.text() == "hi"
    assert (ports.read(serial.port, BASE), ports.read(serial.port, IER)) == (b"\0", b"\0"), "nothing received, no interrupts on"


def test_string_output_arrives_in_order() -> None:
    serial, console = port()
    serial.port(BASE, 1, 5, memoryview(bytearray(b"hello")), True)
    assert console.text() == "hello"


def test_the_line_is_always_ready_and_never_interrupts() -> None:
    serial, _ = port()
    assert ports.read(serial.port, LSR) == b"\x60"
    assert ports.read(serial.port, FCR) == b"\x01"
    ports.write(serial.port, FCR, 1)
    assert ports.read(serial.port, FCR) == b"\xc1", "a 16550A shows that its FIFOs are on"
    ports.write(serial.port, IER, 0xFF)
    assert ports.read(serial.port, IER) == b"\x0f", "the upper half does not exist"
    assert ports.read(serial.port, FCR) == b"\xc1"


def test_scratch_keeps_and_status_registers_cannot_be_written() -> None:
    serial, _ = port()
    for register in (LSR, MSR, SCR):
        ports.write(serial.port, register, 0x5A)
    assert ports.read(serial.port, SCR) == b"\x5a"
    assert ports.read(serial.port, LSR) == b"\x60"
    assert ports.read(serial.port, MSR) == b"\xb0"


def test_loopback_turns_the_line_around() -> None:
    serial, console = port()
    ports.write(serial.port, MCR, 0x1A)  # loopback, RTS, OUT2
    assert ports.read(serial.port, MSR) == b"\x90", "CTS and DCD"
    ports.write(serial.port, BASE, ord("x"))
    assert ports.read(serial.port, LSR) == b"\x61"
    assert ports.read(serial.port, BASE) == b"x"
    assert ports.read(serial.port, LSR) == b"\x60"
    assert console.text() == "", "nothing leaves the port in loopback"
    ports.write(serial.port, MCR, 0x03)
    ports.write(serial.port, BASE, ord("y"))
    assert console.text() == "y"


def test_a_wide_access_is_one_of_consecutive_registers() -> None:
    serial, _ = port()
    ports.write(serial.port, LCR, 0x1F03, 2)
    assert ports.read(serial.port, LCR, 2) == b"\x03\x1f"
    assert ports.read(serial.port, SCR, 2) == b"\x00\xff", "beyond the port there is nothing"


@given(st.lists(st.tuples(st.integers(0, REGISTERS - 1), st.booleans(), st.integers(0, 255), st.sampled_from([1, 2, 4]))))
def test_no_sequence_of_accesses_is_an_error(accesses: list[tuple[int, bool, int, int]]) -> None:
    serial, console = port()
    for register, out, value, size in accesses:
        if out:
            ports.write(serial.port, BASE + register, value, size)
        else:
            assert len(ports.read(serial.port, BASE + register, size)) == size
    assert len(console.data) <= sum(size for register, out, _, size in accesses if out)
