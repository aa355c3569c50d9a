"""The measured launch: what is measured, in which order, and what is private afterwards."""

from typing import Any

import pytest

from tests.vmm import flat
from vmm import boot
from vmm.config import MachineConfig
from vmm.machine import Machine
from vmm.measure import runs

MIB = 1 << 20
pytestmark = pytest.mark.usefixtures("no_leaks")


def test_pages_become_ascending_runs() -> None:
    pages = dict.fromkeys([0x5000, 0x1000, 0x2000, 0x9000, 0x3000], bytes(0x1000))
    assert list(runs(pages)) == [(0x1000, 0x3000), (0x5000, 0x1000), (0x9000, 0x1000)]
    assert list(runs({})) == []


def test_everything_the_guest_starts_with_is_measured_in_ascending_order(model_host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    from kvmapi.launch import Started

    measured: list[tuple[int, int]] = []
    plain = hashlib.sha256()
    real = Started.update_data

    def watched(self: Started, hva: int, size: int) -> None:
        import ctypes

        measured.append((hva, size))
        plain.update(ctypes.string_at(hva, size))
        real(self, hva, size)

    monkeypatch.setattr(Started, "update_data", watched)
    with Machine(MachineConfig(flat.image(flat.HALT), model_host, type="sev", memory=16 * MIB, vcpus=2)) as machine:
        base = machine.memory.slots[0].hva
        found = [(hva - base, size) for hva, size in measured]
        assert machine.launch is not None
        assert machine.launch.match
        assert machine.launch.digest == plain.digest(), "what lay in memory when it was measured"
        assert machine.memory.read(boot.BOOT_INFO, 8) != b"SEVMMBI1", "our mapping shows ciphertext now"
        states = [(r.gpa, r.size, r.state) for r in machine.map.ranges()]
    assert found == sorted(found)
    covered = {gpa for start, size in found for gpa in range(start, start + size, 4096)}
    assert {boot.GDT, boot.IDT, boot.BOOT_INFO, boot.TABLES, boot.STACKS, boot.STACKS + 3 * 4096, boot.TSS, 0x100000} <= covered
    assert boot.SHARED_PAGE not in covered
    assert not any(boot.TEST_AREA <= gpa < boot.TEST_AREA + boot.TEST_SIZE for gpa in covered)
    assert states == [
        (0, 0x5000, "private"), (0x5000, 0x1000, "shared"), (0x6000, 0x7FA000, "private"), (0x800000, 0x800000, "shared"),
    ]  # fmt: skip
