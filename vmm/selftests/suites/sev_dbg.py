"""sev_dbg_test: DBG_ENCRYPT and DBG_DECRYPT work at any alignment and length, and change nothing beside what they were given.

Two pages of the guest's private memory, two pages to encrypt from (`source`), two to decrypt to (`target`). Sizes and offsets lie around
the 16 bytes of a cipher block and the 4096 of a page. Whatever is done, `source` and `target` must be the same in the end: then the guest's
memory holds what it should, to the byte.
"""

from __future__ import annotations

import mmap
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from kvmapi.abi import sev as s
from kvmapi.sev import SevPlatform
from kvmapi.system import System
from vmm.selftests import hostmem
from vmm.selftests.api import Case, Subtest, check_equal, runs_on
from vmm.selftests.sev_vms import SevGuest

PAGE = 4096
BUFFER = 2 * PAGE
LENGTHS = (1, 8, 15, 16, 17, 32, 33)
OFFSETS = (1, 8, 15, 16, 23)
NEAR_THE_END = PAGE - 24


class Debugger:
    """A running guest and the two buffers."""

    def __init__(self, guest: SevGuest) -> None:
        self.guest = guest
        self.source, self.target = (mmap.mmap(-1, BUFFER) for _ in range(2))
        self._source, self._target = hostmem.address_of(self.source), hostmem.address_of(self.target)
        self._random = random.Random(73)

    def encrypt(self, source: int, inside: int, size: int) -> None:
        """`size` bytes of the source buffer, from offset `source`, into the guest's memory at `inside`."""
        data = s.kvm_sev_dbg(src_uaddr=self._source + source, dst_uaddr=self.guest.hva + inside, len=size)
        self.guest.command(s.KVM_SEV_DBG_ENCRYPT, data)

    def decrypt(self, inside: int, target: int, size: int) -> None:
        """`size` bytes of the guest's memory, from offset `inside`, into the target buffer."""
        data = s.kvm_sev_dbg(src_uaddr=self.guest.hva + inside, dst_uaddr=self._target + target, len=size)
        self.guest.command(s.KVM_SEV_DBG_DECRYPT, data)

    def check(self, outside: int, inside: int, size: int) -> None:
        """One pattern there and back."""
        if outside + size > BUFFER or inside + size > BUFFER:
            return
        pattern = bytes([self._random.randrange(256)]) * size
        self.source[outside : outside + size] = pattern
        self.encrypt(outside, inside, size)
        self.decrypt(inside, outside, size)
        what = f"{size} bytes between offset {outside} and the guest's {inside}"
        check_equal(self.target[outside : outside + size], pattern, what)
        check_equal(self.target[:], self.source[:], f"the whole buffer after {what}")

    def close(self) -> None:
        """Unmap the buffers."""
        self.source.close()
        self.target.close()


on_sev = runs_on("sev", "sev-es")


@contextmanager
def debugger(system: System, case: Case) -> Iterator[Debugger]:
    """A launched guest whose policy allows debugging, with a buffer of 0xAA."""
    policy = s.SEV_POLICY_ES if case.type == "sev-es" else 0
    with SevPlatform(system.host) as platform:
        guest = SevGuest(system, platform, type=case.vm_type)
        it = Debugger(guest)
        try:
            guest.init().add_vcpus(1).add_memory(b"\xaa" * BUFFER).start(policy).measure().finish()
            it.decrypt(0, 0, BUFFER)  # also: source and target are the same to begin with
            check_equal(it.target[:], b"\xaa" * BUFFER, "the launched content, decrypted")
            it.source[:] = b"\x55" * BUFFER
            it.encrypt(0, 0, BUFFER)
            it.decrypt(0, 0, BUFFER)
            check_equal(it.target[:], b"\x55" * BUFFER, "the whole buffer, encrypted and decrypted")
            yield it
        finally:
            it.close()
            guest.close()


def check_sizes(system: System, case: Case, subtest: Subtest, sizes: Iterable[int]) -> None:
    """Each of these lengths at all offsets."""
    with debugger(system, case) as it:
        for size in sizes:
            with subtest(f"{size} bytes"):
                for outside, inside in pairs():
                    it.check(outside, inside, size)


@on_sev
def test_sev_dbg(system: System, case: Case, subtest: Subtest) -> None:
    """One page."""
    check_sizes(system, case, subtest, [PAGE])


@on_sev
def test_sev_dbg_blocks(system: System, case: Case, subtest: Subtest) -> None:
    """About one or two of the cipher's blocks."""
    check_sizes(system, case, subtest, LENGTHS)


@on_sev
def test_sev_dbg_below_a_page(system: System, case: Case, subtest: Subtest) -> None:
    """A little less than a page."""
    check_sizes(system, case, subtest, [PAGE - length for length in LENGTHS])


@on_sev
def test_sev_dbg_above_a_page(system: System, case: Case, subtest: Subtest) -> None:
    """A little more than a page."""
    check_sizes(system, case, subtest, [PAGE + length for length in LENGTHS])


@on_sev
def test_sev_dbg_below_the_buffer(system: System, case: Case, subtest: Subtest) -> None:
    """A little less than two pages."""
    check_sizes(system, case, subtest, [BUFFER - length for length in LENGTHS])


def pairs() -> Iterator[tuple[int, int]]:
    """Offsets (outside, inside the guest)."""
    yield 0, 0
    for outside in OFFSETS:
        for inside in OFFSETS:
            for at in (0, NEAR_THE_END):
                yield from ((at + outside, inside), (at + outside, NEAR_THE_END + inside))
