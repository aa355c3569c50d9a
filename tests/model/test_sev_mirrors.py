"""Mirrors (COPY of the encryption context): whom they keep alive, whom they follow, and that they see their owner's memory."""

from __future__ import annotations

import struct
import threading
from errno import EBADF, EBUSY, ENOTTY
from typing import Any

import pytest

from kvmapi.abi import caps, sev
from kvmapi.exits import Hlt
from kvmapi.model.host import ModelHost
from kvmapi.model.platform import Platform
from tests.conformance.snippets import DATA, MIB, PAGE, LongGuest, code
from tests.model.sev_guest import C_MASK, LOAD, STORE, SevGuest
from tests.model.sev_vm import BAD, FIRMWARE, UNTOUCHED, Family, Sev, buffer, close, sev_at_fd_zero

pytestmark = pytest.mark.model
COPY, MOVE = caps.KVM_CAP_VM_COPY_ENC_CONTEXT_FROM, caps.KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM


# ---- lives
def test_a_mirror_keeps_the_guest_alive(family: Family) -> None:
    source, mirror = family.guest(), family.aux()
    assert mirror.copy(source) == 0
    with Sev(family.host) as third:
        third.to("started")
        close(source)
        assert family.firmware.guest_count == 2
        assert {guest.asid for guest in family.firmware._guests.values()} == {5, 6}
    close(mirror)
    assert family.firmware.guest_count == 0


def test_the_last_one_gives_the_asid_back() -> None:
    host = ModelHost(Platform(asids=1, min_sev_asid=1))
    family = Family(host)
    with family.all:
        guest, mirror, other = family.guest(), family.aux(), family.aux()
        assert mirror.copy(guest) == 0
        close(guest)
        assert other.init()[0] == EBUSY
        close(mirror)
        assert other.init()[0] == 0


def test_mirrors_follow_a_moved_owner(family: Family) -> None:
    guest, target, mirrors = family.guest(), family.aux(), [family.aux() for _ in range(3)]
    for mirror in mirrors:
        assert mirror.copy(guest) == 0
    assert target.move(guest) == 0
    close(guest)
    close(target)
    assert family.firmware.guest_count == 1, "three mirrors hold the new owner"
    for mirror in mirrors:
        assert family.firmware.guest_count == 1
        close(mirror)
    assert family.firmware.guest_count == 0


def test_a_mirror_that_is_gone_holds_nothing(family: Family) -> None:
    guest, target, mirror = family.guest(), family.aux(), family.aux()
    assert mirror.copy(guest) == 0
    close(mirror)
    assert target.move(guest) == 0
    close(target)
    assert family.firmware.guest_count == 0


def test_a_mirror_of_a_guest_that_is_not_started(family: Family) -> None:
    """COPY takes the handle and the fd of that moment; the key belongs to the ASID, and comes later."""
    guest, mirror = family.aux(type=2), family.aux()
    guest.to("init")
    assert mirror.copy(guest) == 0 and guest.start() == (0, 0)
    assert mirror.op(sev.KVM_SEV_GUEST_STATUS, BAD) == (EBADF, UNTOUCHED)
    with sev_at_fd_zero(family.host):
        assert mirror.op(sev.KVM_SEV_GUEST_STATUS, BAD) == FIRMWARE["INVALID_GUEST"]
    secure = [family.host.file(vm.vm.fd).physical.secure for vm in (guest, mirror)]
    assert secure[0].cipher is secure[1].cipher


def test_a_mirror_debugs_its_owners_memory(family: Family) -> None:
    guest, mirror = family.guest(), family.aux()
    assert mirror.copy(guest) == 0
    with buffer() as out:
        assert mirror.debug(sev.KVM_SEV_DBG_DECRYPT, guest.hva, out.address, PAGE) == (0, 0) and not any(out.memory[:])
        guest.device.close()
        assert mirror.debug(sev.KVM_SEV_DBG_DECRYPT, guest.hva, out.address, PAGE) == (EBADF, UNTOUCHED), "the owner's fd"


def test_an_es_mirror_measures_into_the_owners_launch(family: Family) -> None:
    guest, mirror = family.guest(es=True), family.aux()
    assert mirror.copy(guest) == 0
    mirror.add_vcpu()
    assert guest.measure() == (0, 0)
    assert mirror.op(sev.KVM_SEV_LAUNCH_UPDATE_VMSA) == FIRMWARE["INVALID_GUEST_STATE"]


def test_a_plain_mirror_has_no_vmsas(family: Family) -> None:
    guest, mirror = family.guest(), family.aux()
    assert mirror.copy(guest) == 0 and mirror.op(sev.KVM_SEV_LAUNCH_UPDATE_VMSA) == (ENOTTY, UNTOUCHED)


# ---- memory
SECRET = 0x5EC2E7_0F_7E57
ADD = code("f048ff03 48ffc9 75f7 f4", "0: lock inc qword ptr [rbx]; dec rcx; jnz 0b; hlt")


def start_long(guest: SevGuest, vm: LongGuest) -> None:
    """Let a VM see the guest's memory, and give its vCPUs the guest's way of running."""
    vm.vm.set_user_memory_region(0, 0, 2 * MIB, guest.hva)
    for vcpu in vm.vcpus:
        vm.start_long(vcpu)


class Onlooker(LongGuest):
    """A VM of type 0 without memory of its own so far."""

    def __init__(self, host: Any, vcpus: int = 0) -> None:
        super().__init__(host, LOAD + STORE, 0, c_mask=C_MASK, vcpus=0)
        self.vm.set_user_memory_region(0, 0, 0, 0)
        for _ in range(vcpus):
            self.add_vcpu()

    load, store = SevGuest.load, SevGuest.store


def test_a_mirror_sees_what_its_owner_sees(model_host: Any) -> None:
    with SevGuest(model_host) as guest, Onlooker(model_host) as mirror:
        guest.store(DATA, SECRET)
        assert share(mirror, COPY, guest) == 0
        mirror.add_vcpu()
        start_long(guest, mirror)
        assert mirror.load(DATA) == SECRET
        mirror.store(DATA, 77)
        assert guest.load(DATA) == 77, "and the other way round"
        guest.store(DATA, 78)
        assert mirror.load(DATA) == 78
        assert struct.pack("<Q", SECRET) not in guest.get(0, 2 * MIB)


def share(target: LongGuest, cap: int, source: LongGuest) -> int:
    return Sev.share(target, cap, source.vm.fd)  # type: ignore[arg-type]


def test_owner_and_mirror_run_at_the_same_time(model_host: Any) -> None:
    """Both count in one word of private memory, in turns that the engine lock gives them: nothing is lost."""
    rounds = 1_000_000
    with SevGuest(model_host, LOAD + STORE + ADD) as guest, Onlooker(model_host) as mirror:
        guest.store(DATA, 0)
        assert share(mirror, COPY, guest) == 0
        mirror.add_vcpu()
        start_long(guest, mirror)
        at = 0x10000 + len(LOAD + STORE)
        results: list[Any] = []
        both = threading.Barrier(2)

        def count(vm: Any) -> None:
            vm.regs(rip=at, rbx=DATA, rcx=rounds)
            both.wait()
            results.append(vm.run())

        threads = [threading.Thread(target=count, args=(vm,)) for vm in (guest, mirror)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert model_host.file(guest.vm.fd).lock is model_host.file(mirror.vm.fd).lock
        assert results == [Hlt(), Hlt()] and guest.load(DATA) == mirror.load(DATA) == 2 * rounds


def test_a_moved_guest_keeps_its_memory(model_host: Any) -> None:
    with SevGuest(model_host) as guest, Onlooker(model_host, vcpus=1) as target:
        # Type 0, because a moved VM of type 2 cannot run: so the guest goes by way of a mirror of type 0.
        guest.store(DATA, SECRET)
        with Onlooker(model_host) as mirror:
            assert share(mirror, COPY, guest) == 0
            assert share(target, MOVE, mirror) == 0
            start_long(guest, target)
            assert target.load(DATA) == SECRET
            target.store(DATA, 5)
            assert guest.load(DATA) == 5
