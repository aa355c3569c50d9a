"""The vault: keys rest where nothing reads them, doors nest, room comes back wiped."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from pathlib import Path

import pytest

from kvmapi.abi import psp
from kvmapi.model.sev.status import FirmwareError
from kvmapi.model.sev.vault import Vault
from kvmapi.wiping import wipe


def protection(vault: Vault) -> str:
    """The permissions of the vault's mapping, as the kernel sees them."""
    start = f"{vault._region.address:x}-"
    return next(line for line in Path("/proc/self/maps").read_text().splitlines() if line.startswith(start)).split()[1]


def test_the_door_opens_for_whoever_is_inside() -> None:
    vault = Vault()
    assert protection(vault).startswith("---")
    with vault.opened():
        with vault.opened():
            assert protection(vault).startswith("rw")
        assert protection(vault).startswith("rw")
    assert protection(vault).startswith("---")


def test_many_threads_share_the_door() -> None:
    vault = Vault()
    secret = vault.hold(16)
    secret.set(b"k" * 16)
    wrong = []

    def work() -> None:
        for _ in range(300):
            with vault.opened():
                if bytes(secret.view) != b"k" * 16:
                    wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and protection(vault).startswith("---")


def test_the_kernel_reads_none_of_it() -> None:
    vault = Vault()
    secret = vault.hold(32)
    secret.fill_random()
    if not vault.secret:
        pytest.skip("this kernel has no memfd_secret (boot with secretmem.enable=1): PROT_NONE is all that protects the vault")
    fd = os.open("/proc/self/mem", os.O_RDONLY)
    try:
        with vault.opened(), pytest.raises(OSError):
            os.pread(fd, 16, vault._region.address)
    finally:
        os.close(fd)


def test_room_comes_back_wiped_and_is_bounded() -> None:
    vault = Vault()
    first = vault.hold(20)
    first.set(b"x" * 20)
    first.release()
    first.release()
    again = vault.hold(30)  # the same room: sizes are rounded up to 16
    with vault.opened():
        assert bytes(again.view) == bytes(30)
    held = []
    with pytest.raises(FirmwareError) as failure:
        while True:
            held.append(vault.hold(32))
    assert failure.value.status == psp.SEV_RET_RESOURCE_LIMIT and len(held) > 1000
    held.pop().release()
    assert vault.hold(32).size == 32


def test_random_is_random() -> None:
    vault = Vault()
    one, two = vault.hold(16), vault.hold(16)
    one.fill_random()
    two.fill_random()
    with vault.opened():
        assert bytes(16) != bytes(one.view) != bytes(two.view) != bytes(16)


def test_a_secret_tells_nothing() -> None:
    secret = Vault().hold(16)
    secret.set(b"sixteen bytes..!")
    assert "sixteen" not in repr(secret) + str(secret)
    for attempt in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="never leaves"):
            attempt(secret)


def test_wipe_overwrites_in_place() -> None:
    heap, array = os.urandom(40), bytearray(b"secret")
    seen = memoryview(heap)
    wipe(heap)
    wipe(array)
    assert bytes(seen) == bytes(40) and array == bytes(6)
