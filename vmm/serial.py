"""The 16550 serial port at 0x3F8 as foreign guests program it: all eight registers, for a line on which nothing ever arrives.

Guests of our own write one register and never look (docs/seams.md §4); theirs is the bare `Console`. A foreign guest sets the divisor
(DLAB), polls LSR, tries the scratch register and the loopback to see whether somebody is there. There are no interrupts: IIR says "none",
and the guest polls.

Invariants: what the guest sends reaches the console exactly when DLAB is clear and loopback off; one byte is kept in loopback, no more.
"""

from __future__ import annotations

from vmm.devices import LSR_READY, Console

BASE, REGISTERS = 0x3F8, 8
_DATA, _IER, _IIR_FCR, _LCR, _MCR, _LSR, _MSR, _SCR = range(8)
_DLAB, _LOOPBACK, _DATA_READY = 0x80, 0x10, 0x01
_NO_INTERRUPT, _FIFOS = 0x01, 0xC0
_LINE_UP = 0xB0  # CTS, DSR, DCD: somebody is at the other end


class Serial:
    """The port; output goes to `console`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._registers = bytearray(REGISTERS)
        self._divisor = bytearray(b"\x01\x00")
        self._fifos = False
        self._looped: int | None = None
        self._plain = True  # DLAB clear and loopback off: a byte to the data register is output

    def port(self, port: int, size: int, count: int, data: memoryview, out: bool) -> None:
        """Any of the eight registers. A wider access is one of consecutive byte registers, as on the ISA bus."""
        for at in range(len(data)):
            register = port - BASE + at % size
            if register >= REGISTERS:
                if not out:
                    data[at] = 0xFF
            elif out:
                self._write(register, data[at : at + 1])
            else:
                data[at] = self._read(register)

    def _write(self, register: int, data: memoryview) -> None:
        value = data[0]
        if register == _DATA and self._plain:
            self.console.port(BASE, 1, 1, data, True)
        elif register == _DATA and not self._registers[_LCR] & _DLAB:
            self._looped = value
        elif register in (_DATA, _IER) and self._registers[_LCR] & _DLAB:
            self._divisor[register] = value
        elif register == _IIR_FCR:
            self._fifos = bool(value & 1)
        elif register not in (_LSR, _MSR):
            self._registers[register] = value & 0x0F if register == _IER else value & 0x1F if register == _MCR else value
            self._plain = not self._registers[_LCR] & _DLAB and not self._registers[_MCR] & _LOOPBACK

    def _read(self, register: int) -> int:
        if register in (_DATA, _IER) and self._registers[_LCR] & _DLAB:
            return self._divisor[register]
        if register == _DATA:
            value, self._looped = self._looped or 0, None
            return value
        if register == _IIR_FCR:
            return _NO_INTERRUPT | (_FIFOS if self._fifos else 0)
        if register == _LSR:
            return LSR_READY | (_DATA_READY if self._looped is not None else 0)
        if register == _MSR:
            return self._modem_status()
        return self._registers[register]

    def _modem_status(self) -> int:
        """The line's own, or in loopback the outputs: DTR, RTS, OUT1, OUT2 come back as DSR, CTS, RI, DCD."""
        control = self._registers[_MCR]
        if not control & _LOOPBACK:
            return _LINE_UP
        pairs = ((0x01, 0x20), (0x02, 0x10), (0x04, 0x40), (0x08, 0x80))
        return sum(status for output, status in pairs if control & output)
