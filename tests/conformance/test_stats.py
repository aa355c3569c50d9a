"""KVM_GET_STATS_FD: what the file says about itself, that it counts, and that it outlives what it counts."""

from __future__ import annotations

import errno
import os
import struct
from typing import Any

import pytest

from kvmapi.abi import ioctls
from kvmapi.exits import Hlt
from tests.conformance.snippets import LongGuest, Machine, code, expect_errno

HALT = code("f4 f4 f4", "hlt; hlt; hlt")


def read_stats(fd: int) -> tuple[str, dict[str, int]]:
    """(id, numbers by name), as a program that knows nothing of its kernel reads them."""
    flags, name_size, count, id_at, descriptors, data = struct.unpack("<6I", os.pread(fd, 24, 0))
    assert flags == 0 and id_at >= 24 and descriptors >= id_at + name_size and data >= descriptors + count * (16 + name_size)
    identity = os.pread(fd, name_size, id_at).split(b"\0")[0].decode()
    found = {}
    for number in range(count):
        row = os.pread(fd, 16 + name_size, descriptors + number * (16 + name_size))
        kind, exponent, size, offset, bucket = struct.unpack("<IhHII", row[:16])
        name = row[16:].split(b"\0")[0].decode()
        assert kind & 0xF <= 4 and kind >> 4 & 0xF <= 4 and kind >> 8 & 0xF <= 1 and size and bool(bucket) == (kind & 0xF == 3)
        assert exponent <= 0 if kind >> 4 & 0xF == 2 else exponent >= 0
        value = os.pread(fd, 8 * size, data + offset)
        assert len(value) == 8 * size
        found[name] = int.from_bytes(value[:8], "little")
    return identity, found


def test_what_a_vcpu_did(any_host: Any) -> None:
    with LongGuest(any_host, HALT) as guest:
        fd = guest.vcpu.ioctl(ioctls.KVM_GET_STATS_FD)
        identity, before = read_stats(fd)
        assert identity.startswith("kvm-") and identity.endswith("/vcpu-0")
        for _ in range(3):
            assert guest.run() == Hlt()
        after = read_stats(fd)[1]
        assert after["halt_exits"] == before["halt_exits"] + 3 and after["exits"] >= before["exits"] + 3
        assert {"signal_exits", "irq_injections", "nmi_injections", "halt_wakeup", "halt_wait_ns", "blocking"} <= set(after)
        again = guest.vcpu.ioctl(ioctls.KVM_GET_STATS_FD)
        assert again != fd and read_stats(again)[1]["halt_exits"] == after["halt_exits"]
        assert os.read(again, 24) == os.read(fd, 24), "each has a position of its own"
        any_host.close(again)
        any_host.close(fd)


def test_the_file_outlives_its_vm(any_host: Any) -> None:
    with LongGuest(any_host, HALT) as guest:
        of_vm, of_vcpu = guest.vm.ioctl(ioctls.KVM_GET_STATS_FD), guest.vcpu.ioctl(ioctls.KVM_GET_STATS_FD)
        copy = os.dup(of_vcpu)
        assert guest.run() == Hlt()
        numbers = read_stats(of_vcpu)[1]
    identity, found = read_stats(of_vm)
    assert identity.startswith("kvm-") and "remote_tlb_flush" in found
    assert read_stats(of_vcpu)[1]["halt_exits"] == numbers["halt_exits"] == read_stats(copy)[1]["halt_exits"]
    for fd in (of_vm, of_vcpu):
        any_host.close(fd)
    os.close(copy)


def test_nobody_writes_it(any_host: Any) -> None:
    with Machine(any_host) as machine:
        fd = machine.vm.ioctl(ioctls.KVM_GET_STATS_FD)
        with pytest.raises(OSError) as refused:
            os.write(fd, b"x")
        assert refused.value.errno == errno.EBADF
        with pytest.raises(OSError):
            os.ftruncate(fd, 0)
        assert expect_errno(any_host.ioctl(fd, ioctls.KVM_GET_API_VERSION)) == errno.ENOTTY
        any_host.close(fd)


def test_not_even_through_proc(model_host: Any) -> None:
    """A memfd opened anew through /proc is writable unless it is sealed, and a shorter one would kill who counts in it."""
    with LongGuest(model_host, HALT) as guest:
        fd = guest.vcpu.ioctl(ioctls.KVM_GET_STATS_FD)
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        for attempt in (lambda: os.ftruncate(again, 0), lambda: os.pwrite(again, b"\xff" * 64, 0), lambda: os.ftruncate(again, 1 << 20)):
            with pytest.raises(PermissionError):
                attempt()
        os.close(again)
        assert guest.run() == Hlt() and read_stats(fd)[1]["halt_exits"] == 1
        model_host.close(fd)
