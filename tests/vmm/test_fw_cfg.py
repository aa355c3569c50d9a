"""fw_cfg: items by selector, bytes in order, and what a guest gets that asks for nonsense."""

import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vmm import ports
from tests.vmm.pcguests import OUT_EAX, elf, write
from vmm import fw_cfg
from vmm.fw_cfg import DATA, SELECTOR, FwCfg
from vmm.run import GuestRequest, run_guest


def item(device: FwCfg, key: int, size: int) -> bytes:
    ports.write(device.select, SELECTOR, key, 2)
    return b"".join(ports.read(device.data, DATA) for _ in range(size))


def test_the_items_of_the_contract() -> None:
    device = FwCfg(memory=64 << 20, vcpus=3)
    assert item(device, fw_cfg.SIGNATURE, 4) == b"QEMU"
    assert item(device, fw_cfg.ID, 4) == struct.pack("<I", 1), "ports, no DMA"
    assert item(device, fw_cfg.RAM_SIZE, 8) == struct.pack("<Q", 64 << 20)
    assert item(device, fw_cfg.NB_CPUS, 2) == item(device, fw_cfg.MAX_CPUS, 2) == b"\3\0"


def test_beyond_the_end_and_of_unknown_items_bytes_are_0() -> None:
    device = FwCfg(memory=64 << 20, vcpus=3)
    assert item(device, fw_cfg.NB_CPUS, 5) == b"\3\0\0\0\0"
    assert item(device, 0x11, 8) == bytes(8)
    assert ports.read(FwCfg(0, 1).data, DATA) == b"\0", "nothing is selected at the start"


def test_selecting_again_begins_again() -> None:
    device = FwCfg(memory=64 << 20, vcpus=1)
    assert item(device, fw_cfg.SIGNATURE, 2) == b"QE"
    assert item(device, fw_cfg.SIGNATURE, 4) == b"QEMU"


def test_a_string_read_takes_as_many_bytes() -> None:
    device = FwCfg(memory=64 << 20, vcpus=1)
    ports.write(device.select, SELECTOR, fw_cfg.SIGNATURE, 2)
    assert ports.read(device.data, DATA, 1, 3) == b"QEM"
    assert ports.read(device.data, DATA, 1, 3) == b"U\0\0"


def test_nothing_can_be_written() -> None:
    device = FwCfg(memory=64 << 20, vcpus=1)
    ports.write(device.select, SELECTOR, fw_cfg.SIGNATURE, 2)
    ports.write(device.data, DATA, 0x58)
    assert ports.read(device.data, DATA) == b"Q"


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 0xFFFFFFFF), st.sampled_from([1, 2, 4]), st.integers(1, 4096))))
def test_no_sequence_of_accesses_is_an_error(accesses: list[tuple[bool, int, int, int]]) -> None:
    device = FwCfg(memory=64 << 20, vcpus=1)
    for out, value, size, count in accesses:
        data = bytearray((value & (1 << 8 * size) - 1).to_bytes(size, "little") * count)
        for handler, port in ((device.select, SELECTOR), (device.data, DATA)):
            handler(port, size, count, memoryview(data), out)
            assert len(data) == size * count


@pytest.mark.parametrize("vcpus", [1, 2])
def test_a_guest_reads_how_many_cpus_it_has(any_host: Any, tmp_path: Path, vcpus: int) -> None:
    """mov eax, 5; mov dx, 0x510; out dx, ax; inc dx; in al, dx; movzx eax, al."""
    code = bytes.fromhex("b80500000066ba100566ef6642ec0fb6c0") + OUT_EAX
    report = run_guest(GuestRequest(write(tmp_path, elf(code)), host=any_host, vcpus=vcpus, timeout=20))
    assert (report.exit_code, report.message) == (vcpus, "")
