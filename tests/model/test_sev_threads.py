"""Several threads send SEV commands to the same VMs, move and mirror their contexts, and close them meanwhile: no call hangs, none raises,
and when all is closed no guest is left and every ASID can be had again.
"""

from __future__ import annotations

import ctypes
import random
import threading
from errno import EBUSY
from typing import Any

import pytest

from kvmapi.abi import ioctls, psp, structs
from kvmapi.abi import sev as s
from kvmapi.model.host import ModelHost
from kvmapi.model.platform import Platform
from tests.model.sev_arena import Arena

pytestmark = pytest.mark.model
THREADS, CALLS, MOST_VMS, ASIDS, MIN_SEV_ASID = 3, 700, 8, 8, 4
COMMANDS = (4, 7, 9, 11, 15, 16, 20, 21)  # those for which any struct will do


class Vms:
    """The VMs of all threads: [vm fd, vCPU fds]. Whoever takes one out closes it, with what it has by then."""

    def __init__(self) -> None:
        self.host = ModelHost(Platform(asids=ASIDS, min_sev_asid=MIN_SEV_ASID))
        self.kvm, self.sev = self.host.open("/dev/kvm", 2), self.host.open("/dev/sev", 2)
        self.lock = threading.Lock()
        self.all: list[list[int]] = []
        self.vcpus: set[int] = set()
        self.wrong: list[str] = []

    def call(self, fd: int, request: int, argument: int) -> int:
        answer = self.host.ioctl(fd, request, argument)
        if type(answer) is not int or answer < -4095:
            self.wrong.append(f"{request:#x}: {answer!r}")
        return answer

    def close(self, vm: list[int]) -> None:
        """Its vCPUs first; an fd that another thread adds in this moment waits for the end."""
        with self.lock:
            mine = [fd for fd in vm[1:] if fd in self.vcpus]
            self.vcpus.difference_update(mine)
        for fd in (*mine, vm[0]):
            self.host.close(fd)


def command(vms: Vms, arena: Arena, fd: int, number: int, data: Any = None) -> int:
    if data is not None:
        arena.write(arena.scratch + 0x200, bytes(data))
    arena.write(arena.scratch, bytes(s.kvm_sev_cmd(number, 0, arena.scratch + 0x200, 0, vms.sev)))
    return vms.call(fd, ioctls.KVM_MEMORY_ENCRYPT_OP, arena.scratch)


def create(vms: Vms, arena: Arena, rng: random.Random) -> None:
    """A VM of some type, which is mostly initialised and started."""
    type = rng.choice((0, 2, 2, 3))
    fd = vms.call(vms.kvm, ioctls.KVM_CREATE_VM, type)
    if type and rng.random() < 0.9:
        command(vms, arena, fd, s.KVM_SEV_INIT2, s.kvm_sev_init())
        command(vms, arena, fd, s.KVM_SEV_LAUNCH_START, s.kvm_sev_launch_start(policy=4 if type == 3 else 0))
    with vms.lock:
        vms.all.append([fd])


def one(vms: Vms, arena: Arena, rng: random.Random) -> None:
    """One thing that a VMM does."""
    with vms.lock:
        few = len(vms.all) < MOST_VMS
        vm, other = (rng.choice(vms.all), rng.choice(vms.all)) if vms.all else (None, None)
    what = rng.random()
    if vm is None or other is None or (few and what < 0.2):
        create(vms, arena, rng)
    elif what < 0.1:
        with vms.lock:
            mine = vm in vms.all
            if mine:
                vms.all.remove(vm)
        if mine:
            vms.close(vm)
    elif what < 0.25:
        fd = vms.call(vm[0], ioctls.KVM_CREATE_VCPU, len(vm) - 1)
        if fd >= 0:
            with vms.lock:
                vms.vcpus.add(fd)
                vm.append(fd)
    elif what < 0.5:
        cap = structs.kvm_enable_cap(cap=rng.choice((197, 206)), args=(ctypes.c_uint64 * 4)(other[0]))
        arena.write(arena.scratch + 0x800, bytes(cap))
        vms.call(vm[0], ioctls.KVM_ENABLE_CAP, arena.scratch + 0x800)
    elif what < 0.6:
        command(vms, arena, vm[0], s.KVM_SEV_LAUNCH_UPDATE_DATA, s.kvm_sev_launch_update_data(arena.guest[0], 16384))
    elif what < 0.7:
        command(vms, arena, vm[0], s.KVM_SEV_DBG_DECRYPT, s.kvm_sev_dbg(arena.guest[0], arena.scratch + 0x4000, 4096))
    elif what < 0.75:
        command(vms, arena, vm[0], s.KVM_SEV_LAUNCH_MEASURE, s.kvm_sev_launch_measure(arena.scratch + 0x4000, 48))
    elif what < 0.8:
        region = structs.kvm_enc_region(arena.guest[0], 8192)
        arena.write(arena.scratch + 0x800, bytes(region))
        register = rng.choice((ioctls.KVM_MEMORY_ENCRYPT_REG_REGION, ioctls.KVM_MEMORY_ENCRYPT_UNREG_REGION))
        vms.call(vm[0], register, arena.scratch + 0x800)
    else:
        command(vms, arena, vm[0], rng.choice(COMMANDS), s.kvm_sev_launch_secret())


@pytest.mark.parametrize("seed", range(2))
def test_threads(seed: int) -> None:
    vms = Vms()
    arenas = [Arena(1) for _ in range(THREADS)]

    def work(number: int) -> None:
        rng = random.Random(seed * 100 + number)
        try:
            for _ in range(CALLS):
                one(vms, arenas[number], rng)
        except BaseException as wrong:
            vms.wrong.append(repr(wrong))
            raise

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a call hangs"
    assert vms.wrong == []
    for fd in (*vms.vcpus, *(vm[0] for vm in vms.all)):
        vms.host.close(fd)
    status = psp.sev_user_data_status()
    issue = psp.sev_issue_cmd(psp.SEV_PLATFORM_STATUS, ctypes.addressof(status))
    assert vms.host.ioctl(vms.sev, psp.SEV_ISSUE_CMD, ctypes.addressof(issue)) == 0
    assert (status.guest_count, status.state) == (0, psp.SEV_PLATFORM_INIT)
    fds = []
    for type, room in ((2, ASIDS - MIN_SEV_ASID + 1), (3, MIN_SEV_ASID - 1)):
        answers = []
        for _ in range(room + 1):
            fds.append(vms.host.ioctl(vms.kvm, ioctls.KVM_CREATE_VM, type))
            answers.append(command(vms, arenas[0], fds[-1], s.KVM_SEV_INIT2, s.kvm_sev_init()))
        assert answers == [0] * room + [-EBUSY], "an ASID was not given back"
    for fd in (*fds, vms.sev, vms.kvm):
        vms.host.close(fd)
    for arena in arenas:
        arena.close()
