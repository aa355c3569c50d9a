"""COPY and MOVE of the encryption context: mirrors, dead VMs, what comes along and what KVM leaves behind.

The first tests follow the kernel's sev_migrate_tests.c; the others, what its source says beyond them.
"""

from __future__ import annotations

import ctypes
import os
import threading
from errno import EBADF, EBUSY, EINTR, EINVAL, EIO
from typing import Any

import pytest

from kvmapi.abi import caps, ioctls, sev
from kvmapi.abi.structs import kvm_enable_cap
from kvmapi.model.host import ModelHost
from kvmapi.model.platform import Platform
from tests.conformance.snippets import DATA, LongGuest
from tests.model.sev_guest import LOAD, STORE, SevGuest
from tests.model.sev_vm import BAD, UNTOUCHED, VCPUS, Family, Sev, close, sev_at_fd_zero

pytestmark = pytest.mark.model
COPY, MOVE = caps.KVM_CAP_VM_COPY_ENC_CONTEXT_FROM, caps.KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM


# ---- the kernel's own tests
@pytest.mark.parametrize("es", [False, True])
def test_a_guest_moves_on_and_on(family: Family, es: bool) -> None:
    source, targets = family.guest(es), [family.aux(VCPUS) for _ in range(3)]
    chain = [source, *targets]
    for before, after in zip(chain, targets):
        assert after.move(before) == 0
    assert source.move(targets[-1]) == EIO, "whoever gave its guest away is dead"
    assert family.firmware.guest_count == 1


def test_concurrent_moves(family: Family) -> None:
    """Each thread pulls from all of three guests: none may take one, nobody hangs, every answer is a known one."""
    vms = [family.guest() for _ in range(3)]
    answers: set[int] = set()

    def pull(vm: Sev) -> None:
        for number in range(300):
            answers.add(vm.move(vms[number % 3]))

    threads = [threading.Thread(target=pull, args=(vm,)) for vm in vms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert answers <= {EINVAL, EBUSY, EIO} and EINVAL in answers, "each has a guest: none can take another"


def test_one_of_many_gets_the_guest(family: Family) -> None:
    source, targets = family.guest(), [family.aux() for _ in range(6)]
    answers: list[int] = []
    threads = [threading.Thread(target=lambda vm=vm: answers.append(vm.move(source))) for vm in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers.count(0) == 1 and set(answers) <= {0, EINVAL, EBUSY} and len(answers) == 6


def test_move_parameters(family: Family) -> None:
    no_vcpu, no_sev, sev_vm, es_vm = family.aux(), family.aux(VCPUS), family.guest(), family.guest(es=True)
    no_vmsa = family.guest(es=True, vcpus=1, vmsa=False)
    assert no_vcpu.move(no_sev) == EINVAL, "no guest to move"
    assert sev_vm.move(es_vm) == es_vm.move(sev_vm) == EINVAL, "a guest already"
    assert no_vcpu.move(es_vm) == EINVAL, "as many vCPUs"
    assert family.aux(1).move(no_vmsa) == EINVAL, "VMSAs not measured"
    assert family.aux(VCPUS - 1).move(es_vm) == family.aux(VCPUS + 1).move(es_vm) == EINVAL
    assert family.aux(1).move(sev_vm) == 0, "plain SEV does not count vCPUs"


@pytest.mark.parametrize("es", [False, True])
def test_a_mirror(family: Family, es: bool) -> None:
    source, mirror = family.guest(es), family.aux()
    assert mirror.copy(source) == 0
    for _ in range(VCPUS):
        mirror.add_vcpu()
    if es:
        assert mirror.op(sev.KVM_SEV_LAUNCH_UPDATE_VMSA) == (0, 0)
    allowed = {sev.KVM_SEV_LAUNCH_UPDATE_VMSA, sev.KVM_SEV_GUEST_STATUS, sev.KVM_SEV_DBG_DECRYPT, sev.KVM_SEV_DBG_ENCRYPT}
    for number in set(range(110)) - allowed:
        assert mirror.op(number) == (EINVAL, UNTOUCHED)
    assert mirror.op(sev.KVM_SEV_GUEST_STATUS, BAD)[0] != EINVAL
    assert mirror.op(sev.KVM_SEV_DBG_DECRYPT, BAD) == (14, UNTOUCHED)


def test_copy_parameters(family: Family) -> None:
    sev_vm, es_vm, no_vcpu, with_vcpu = family.guest(), family.guest(es=True), family.aux(), family.aux(VCPUS)
    assert sev_vm.copy(sev_vm) == no_vcpu.copy(no_vcpu) == EINVAL
    assert no_vcpu.copy(with_vcpu) == EINVAL and with_vcpu.copy(sev_vm) == EINVAL
    assert sev_vm.copy(es_vm) == es_vm.copy(sev_vm) == EINVAL
    assert no_vcpu.copy(sev_vm) == 0
    assert family.aux().copy(no_vcpu) == EINVAL, "no mirrors of mirrors"
    assert no_vcpu.copy(es_vm) == no_vcpu.move(es_vm) == EINVAL, "a mirror is a guest"


@pytest.mark.parametrize("mirrors_first", [False, True])
def test_moves_and_copies(family: Family, mirrors_first: bool) -> None:
    guest, mirror = family.guest(), family.aux()
    targets, mirror_targets = [family.aux(VCPUS) for _ in range(3)], [family.aux() for _ in range(3)]
    assert mirror.copy(guest) == 0
    vms, mirrors = [guest, *targets], [mirror, *mirror_targets]
    for at in range(3):
        pairs = [(vms[at + 1], vms[at]), (mirrors[at + 1], mirrors[at])]
        for target, source in reversed(pairs) if mirrors_first else pairs:
            assert target.move(source) == 0
    assert mirrors[-1].finish() == (EINVAL, UNTOUCHED), "a mirror still"
    assert mirrors[-1].op(sev.KVM_SEV_GUEST_STATUS, BAD) == vms[-1].finish() == (EBADF, UNTOUCHED), "whose fd did not come along"
    for vm in (*mirrors, *vms) if mirrors_first else (*vms, *mirrors):
        assert family.firmware.guest_count == 1
        close(vm)


# ---- fds
@pytest.mark.parametrize("cap", [COPY, MOVE])
def test_source_fds(family: Family, cap: int) -> None:
    vm, guest = family.aux(), family.guest(vcpus=1)
    for fd in (-1 & 0xFFFFFFFF, 0, vm.system.fd, vm.device.fd, guest.vcpu.fd, 0x7FFFFFFF):
        assert vm.share(cap, fd) == EBADF
    assert vm.system.check_extension(cap) == vm.vm.check_extension(cap) == 1
    assert vm.share(cap, guest.vm.fd | 0xABCD << 32) == 0, "KVM takes 32 bits of the number"


@pytest.mark.parametrize("cap", [COPY, MOVE])
def test_without_sev(cap: int) -> None:
    host = ModelHost(Platform(sev=False))
    with LongGuest(host, b"\xf4") as one, LongGuest(host, b"\xf4") as two:
        request = kvm_enable_cap(cap=cap)
        for fd, expected in ((two.vm.fd, EINVAL), (one.vm.fd, EINVAL), (one.vcpu.fd, EBADF)):
            request.args[0] = fd
            assert one.vm.ioctl_raw(ioctls.KVM_ENABLE_CAP, ctypes.addressof(request)) == -expected
        request.flags = 1
        assert one.vm.ioctl_raw(ioctls.KVM_ENABLE_CAP, ctypes.addressof(request)) == -EINVAL


def test_types_count_for_a_move_only(family: Family) -> None:
    guest, other = family.guest(), family.aux(type=2)
    assert other.move(guest) == EINVAL
    assert other.copy(guest) == 0, "a mirror may be of any type"
    assert other.init() == (EINVAL, UNTOUCHED)
    other.add_vcpu().kvm_run.immediate_exit = 1
    assert other.vcpu.ioctl_raw(ioctls.KVM_RUN, 0) == -EINTR, "and does not wait for INIT2"


# ---- what is left of the source
def test_the_source_is_dead(family: Family) -> None:
    source, target = family.guest(), family.aux(VCPUS)
    runner = family.host.runner(source.vcpu.fd)
    assert target.move(source) == 0
    for request in (ioctls.KVM_CHECK_EXTENSION, ioctls.KVM_CREATE_VCPU, ioctls.KVM_MEMORY_ENCRYPT_OP, ioctls.KVM_ENABLE_CAP, 0xAEFF, 0):
        assert source.vm.ioctl_raw(request, 0) == -EIO
    for request in (ioctls.KVM_RUN, ioctls.KVM_GET_REGS, ioctls.KVM_SET_REGS, 0xAEFF):
        assert source.vcpu.ioctl_raw(request, 0) == -EIO
    assert runner() == -EIO, "a loop that was about to enter"
    assert family.aux().copy(source) == family.aux(VCPUS).move(source) == EINVAL, "no guest any more"
    close(source)
    assert family.firmware.guest_count == 1, "the guest lives on"


def test_a_vcpu_that_runs_is_waited_for(model_host: Any) -> None:
    """MOVE takes every vCPU's mutex: it comes through when KVM_RUN returns, and not before."""
    spin = b"\xeb\xfe"
    with SevGuest(model_host, LOAD + STORE + spin) as guest, Sev(model_host) as target:
        guest.regs(rip=0x10000 + len(LOAD + STORE))
        closed = model_host.file(target.add_vcpu().fd)
        thread = threading.Thread(target=lambda: guest.vcpu.ioctl_raw(ioctls.KVM_RUN, 0))
        thread.start()
        done: list[int] = []
        mover = threading.Thread(target=lambda: done.append(target.share(MOVE, guest.vm.fd)))
        while not model_host.file(guest.vcpu.fd).mutex.locked():
            pass
        mover.start()
        mover.join(0.05)
        assert not done
        with Sev(model_host) as third:
            assert third.share(COPY, guest.vm.fd) == third.share(MOVE, target.vm.fd) == EBUSY, "both are taken"
        target.vcpu.close()
        assert closed.dead and not closed._gone, "held by the command"
        guest.vcpu.kvm_run.immediate_exit = 1
        thread.join(20)
        mover.join(20)
        assert closed._gone
        assert done == [0] and guest.vcpu.ioctl_raw(ioctls.KVM_RUN, 0) == -EIO


# ---- what KVM does not move
def test_after_a_move_commands_look_at_fd_0(family: Family) -> None:
    source, target = family.guest(), family.aux()
    handle = source.status()[0]
    assert target.move(source) == 0
    assert target.finish() == (EBADF, UNTOUCHED)
    with sev_at_fd_zero(family.host):
        assert target.status() == (handle, 0, sev.SEV_STATE_LAUNCH_UPDATE)
        assert target.measure() == target.finish() == (0, 0)


@pytest.mark.parametrize("type", [2, 3])
def test_a_moved_vm_of_an_sev_type_never_runs(family: Family, type: int) -> None:
    source, target = family.aux(type=type), family.aux(type=type)
    source.to("started")
    assert target.move(source) == 0
    assert target.op(sev.KVM_SEV_INIT2, BAD)[0] == 14, "it still waits for INIT2"
    assert target.init() == (EINVAL, UNTOUCHED), "which finds a guest"
    assert target.add_vcpu().ioctl_raw(ioctls.KVM_RUN, 0) == -EINVAL


def test_a_guest_that_was_not_started_moves_too(family: Family) -> None:
    source, target = family.aux(type=2), family.aux(type=2)
    source.to("init")
    assert target.move(source) == 0
    assert target.start() == (0, 0) and target.update() == (0, 0), "the start names its own fd"


def test_legacy_init_after_a_move(family: Family) -> None:
    source, target = family.guest(vcpus=0), family.aux()
    assert target.move(source) == 0 and target.init() == (EINVAL, UNTOUCHED)


def test_a_vcpu_whose_fd_was_closed_is_not_launched(family: Family) -> None:
    """In the kernel it would live on until the VM goes; in the model it is gone, and is refused rather than left out."""
    guest = family.guest(es=True, vcpus=2, vmsa=False)
    guest.vcpus[1].close()
    assert guest.op(sev.KVM_SEV_LAUNCH_UPDATE_VMSA) == (EINVAL, 0)
    target = family.aux(2)
    assert target.move(guest) == EINVAL
    plain, onlooker = family.guest(), family.aux(1)
    onlooker.vcpu.close()
    assert onlooker.move(plain) == 0, "plain SEV needs no vCPUs"


def test_the_dead_see_nothing(model_host: Any) -> None:
    with SevGuest(model_host) as guest, Sev(model_host) as target:
        guest.store(DATA, 0x5EC2E7)
        vm = model_host.file(guest.vm.fd)
        assert target.share(MOVE, guest.vm.fd) == 0
        assert vm.physical.secure is None and model_host.file(target.vm.fd).physical.secure is not None


def test_sev_es_registers_move_along(family: Family) -> None:
    source, target = family.guest(es=True, vcpus=2), family.aux(2)
    assert target.move(source) == 0
    assert all(family.host.file(vcpu.fd).protected is not None for vcpu in target.vcpus)
    assert all(family.host.file(vcpu.fd).protected is None for vcpu in source.vcpus)
    assert target.vcpu.ioctl_raw(ioctls.KVM_SET_GUEST_DEBUG, target.hva) == -EINVAL


def test_who_waits_to_change_memory_waits_for_the_new_lock(family: Family) -> None:
    """A slot change that waited through the exchange of engine locks must not go on under the old one."""
    guest, mirror = family.guest(), family.aux()
    vm, owner = family.host.file(mirror.vm.fd), family.host.file(guest.vm.fd)
    inside, order = threading.Event(), []

    def wait() -> None:
        inside.set()
        with vm.paused():
            order.append(vm.lock is owner.lock)

    thread = threading.Thread(target=wait)
    old = vm.lock
    with old.paused():
        thread.start()
        inside.wait(20)
        while not old._gate.locked():
            pass  # it waits for the old one
        vm.lock = owner.lock
        with owner.paused():
            pass
    thread.join(20)
    assert order == [True]
    with owner.lock.paused(), old.paused():
        pass  # both were given back


def test_a_forked_child_cannot_take_its_parents_guest(family: Family) -> None:
    """The guest lives in the parent: what the child has of it is a copy without a firmware."""
    guest = family.guest()
    child = os.fork()
    if child == 0:
        try:
            vm = Sev(family.host)
            os._exit(0 if vm.move(guest) == EINVAL and vm.copy(guest) == EINVAL else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert guest.status()[2] == sev.SEV_STATE_LAUNCH_UPDATE
