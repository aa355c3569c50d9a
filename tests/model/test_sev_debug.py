"""DBG_DECRYPT and DBG_ENCRYPT through the ioctl: any address, any length, both ways; refusals in the kernel's order.

The reference is simple: decrypting the whole area gives the plaintext, and ENCRYPT changes exactly the bytes it was
given.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from errno import EBADF, EFAULT, EINVAL, ENOMEM
from typing import Any

import pytest

from kvmapi.abi import sev
from tests.conformance.snippets import DATA, PAGE
from tests.model.sev_guest import SevGuest
from tests.model.sev_vm import BAD, FIRMWARE, UNTOUCHED, Buffer, Sev, buffer

pytestmark = pytest.mark.model
DECRYPT, ENCRYPT = sev.KVM_SEV_DBG_DECRYPT, sev.KVM_SEV_DBG_ENCRYPT
AREA = 2 * PAGE
# As the kernel's own test: around blocks and pages.
OFFSETS = [0, *(base + off for base in (0, PAGE - 24) for off in (1, 8, 15, 16, 23))]
SIZES = [size for base in (0, PAGE, AREA) for off in (-33, -17, -16, -1, 0, 1, 15, 16, 17, 33) if 0 < (size := base + off) <= AREA]


class Debugged(Sev):
    """A guest whose first pages are encrypted, with a scratch buffer beside them."""

    def __init__(self, host: Any, type: int = 2, policy: int | None = None) -> None:
        super().__init__(host, type)
        self.scratch = Buffer(4)
        self.closing.append(self.scratch)
        self.to("started", policy)
        self.plain = os.urandom(AREA)
        self.put(0, self.plain)
        assert self.update(size=AREA) == (0, 0)

    def decrypted(self) -> bytes:
        """All of the area, by aligned commands."""
        with buffer(2) as out:
            assert self.debug(DECRYPT, self.hva, out.address, AREA) == (0, 0)
            return out.memory[:AREA]


@pytest.fixture
def vm(model_host: Any) -> Iterator[Debugged]:
    with Debugged(model_host) as made:
        yield made


@pytest.mark.parametrize("type", [2, 3])
def test_decrypt_at_any_alignment(model_host: Any, type: int) -> None:
    with Debugged(model_host, type) as vm:
        for source, target, size in itertools.product(OFFSETS, OFFSETS, SIZES):
            if max(source, target) + size > AREA:
                continue
            vm.scratch.fill(b"\xee" * 4 * PAGE)
            assert vm.debug(DECRYPT, vm.hva + source, vm.scratch.address + target, size) == (0, 0)
            memory = vm.scratch.memory
            assert memory[target : target + size] == vm.plain[source : source + size]
            assert memory[:target] == b"\xee" * target and memory[target + size : target + size + 64] == b"\xee" * 64
        assert vm.decrypted() == vm.plain


def test_encrypt_at_any_alignment(vm: Debugged) -> None:
    plain, dice = bytearray(vm.plain), random.Random(1)
    for source, target, size in itertools.product(OFFSETS, OFFSETS, SIZES):
        if max(source, target) + size > AREA:
            continue
        new = dice.randbytes(size)
        assert vm.debug(ENCRYPT, vm.scratch.fill(new, source), vm.hva + target, size) == (0, 0)
        plain[target : target + size] = new
        assert new not in vm.get(0, AREA) or size < 4
        if dice.random() < 0.1:
            assert vm.decrypted() == plain
    assert vm.decrypted() == plain
    assert vm.get(AREA, PAGE) == bytes(PAGE), "the page behind is not touched"


def test_decrypt_over_itself(vm: Debugged) -> None:
    assert vm.debug(DECRYPT, vm.hva, vm.hva, AREA) == (0, 0) and vm.get(0, AREA) == vm.plain
    assert vm.debug(ENCRYPT, vm.hva, vm.hva, AREA) == (0, 0) and vm.decrypted() == vm.plain


def test_a_piece_is_read_before_it_is_written(vm: Debugged) -> None:
    assert vm.debug(DECRYPT, vm.hva, vm.hva + 32, 64) == (0, 0) and vm.get(32, 64) == vm.plain[:64]


@pytest.mark.parametrize("number", [DECRYPT, ENCRYPT])
def test_arguments(vm: Debugged, number: int) -> None:
    top = (1 << 64) - 16
    assert vm.op(number, BAD) == (EFAULT, UNTOUCHED)
    for source, target, size in ((0, vm.hva, 1), (vm.hva, 0, 1), (vm.hva, vm.hva, 0), (top, vm.hva, 16), (vm.hva, top, 17)):
        assert vm.debug(number, source, target, size) == (EINVAL, UNTOUCHED)
    assert vm.debug(number, top, vm.hva, 15) == vm.debug(number, BAD, vm.hva, 1) == (ENOMEM, UNTOUCHED)
    assert vm.debug(number, vm.hva, BAD, 1) == (ENOMEM, UNTOUCHED)


@pytest.mark.parametrize("number", [DECRYPT, ENCRYPT])
def test_the_source_is_read_and_the_target_written(vm: Debugged, number: int) -> None:
    page = vm.scratch.forbid(1, 1)
    assert vm.debug(number, page, vm.scratch.address, 16) == (0, 0)
    assert vm.debug(number, vm.scratch.address, page, 16) == (ENOMEM, UNTOUCHED)


@pytest.mark.parametrize(("offset", "size"), [(0, AREA), (5, AREA - 5)])
def test_pieces_before_the_hole_stay_done(vm: Debugged, offset: int, size: int) -> None:
    vm.scratch.forbid(1)
    assert vm.debug(DECRYPT, vm.hva + offset, vm.scratch.address + offset, size) == (ENOMEM, 0)
    assert vm.scratch.memory[offset:PAGE] == vm.plain[offset:PAGE]
    before = vm.get(0, AREA)
    vm.scratch.fill(b"n" * PAGE)
    assert vm.debug(ENCRYPT, vm.scratch.address + offset, vm.hva + offset, size) == (ENOMEM, 0)
    assert vm.decrypted()[offset:PAGE] == b"n" * (PAGE - offset) and vm.get(PAGE, PAGE) == before[PAGE:]


@pytest.mark.parametrize("shift", [0, 5])
def test_either_side_ends_a_piece(vm: Debugged, shift: int) -> None:
    """32 bytes before the hole and 32 in it, while the other side is inside one page."""
    hole, edge = vm.scratch.forbid(1), PAGE - 32
    assert hole == vm.scratch.address + PAGE
    assert vm.debug(DECRYPT, vm.hva + shift, vm.scratch.address + edge, 64) == (ENOMEM, 0)
    assert vm.scratch.memory[edge:PAGE] == vm.plain[shift : shift + 32]
    vm.scratch.fill(b"n" * 32, edge)
    assert vm.debug(ENCRYPT, vm.scratch.address + edge, vm.hva + shift, 64) == (ENOMEM, 0)
    assert vm.decrypted() == vm.plain[:shift] + b"n" * 32 + vm.plain[shift + 32 :]


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("number", [DECRYPT, ENCRYPT])
def test_nodbg_never_decrypts(model_host: Any, number: int, offset: int) -> None:
    with Debugged(model_host, policy=sev.SEV_POLICY_NODBG) as vm:
        before = vm.get(0, AREA)
        for source, target in ((vm.hva + offset, vm.scratch.address), (vm.scratch.address + offset, vm.hva + 16)):
            assert vm.debug(number, source, target, 64) == FIRMWARE["POLICY_FAILURE"]
        assert vm.get(0, AREA) == before and not any(vm.scratch.memory[:])


def test_no_page_stays_decrypted(model_host: Any) -> None:
    """A command that reads or writes guest memory finds it all in the caller's memory, as ciphertext."""
    with SevGuest(model_host) as guest, buffer() as out:
        guest.store(DATA, 0x5EC2E7)
        secure = model_host.file(guest.vm.fd).physical.secure
        assert secure._frames
        guest.vm.sev_op(DECRYPT, sev.kvm_sev_dbg(guest.hva + DATA, out.address, 8))
        assert not secure._frames and out.memory[:8] == (0x5EC2E7).to_bytes(8, "little")


def test_before_the_start(model_host: Any) -> None:
    with Sev(model_host) as vm:
        vm.to("init")
        assert vm.debug(DECRYPT, vm.hva, vm.hva + PAGE, 16) == (EBADF, UNTOUCHED)
        assert vm.debug(DECRYPT, vm.hva, BAD, 16) == (ENOMEM, UNTOUCHED), "pinned before the firmware is asked"


def test_the_pin_limit_counts_both_pages(vm: Debugged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm.host, "memlock_limit", lambda: 2 * PAGE)
    assert vm.debug(DECRYPT, vm.hva, vm.scratch.address, 16) == (0, 0)
    assert vm.region(vm.hva, PAGE) == 0
    assert vm.debug(DECRYPT, vm.hva, vm.scratch.address, 16) == (ENOMEM, UNTOUCHED)
