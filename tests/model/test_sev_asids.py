"""KVM's ASIDs: two ranges, exhaustion, and when a returned one comes around."""

from __future__ import annotations

import threading
from errno import EBUSY, EINVAL, ENOTTY
from typing import Any

import pytest

from kvmapi.abi import ioctls, sev
from kvmapi.model.caller import Errno
from kvmapi.model.host import ModelHost
from kvmapi.model.platform import Platform
from kvmapi.model.sev.asids import AsidPool, pool_of
from tests.model.sev_vm import UNTOUCHED, Sev

pytestmark = pytest.mark.model


def refused(pool: AsidPool, es: bool) -> int:
    with pytest.raises(Errno) as caught:
        pool.take(es=es)
    return caught.value.number


def test_the_ranges() -> None:
    pool = AsidPool(5, 3)
    assert [pool.take(es=False) for _ in range(3)] == [3, 4, 5]
    assert [pool.take(es=True) for _ in range(2)] == [1, 2]
    assert refused(pool, True) == refused(pool, False) == EBUSY


@pytest.mark.parametrize(("lowest", "empty"), [(1, True), (6, False)])
def test_an_empty_range(lowest: int, empty: bool) -> None:
    pool = AsidPool(5, lowest)
    assert refused(pool, empty) == ENOTTY and pool.take(es=not empty) == 1


def test_a_returned_asid_comes_around_last() -> None:
    pool = AsidPool(6, 3)
    first = [pool.take(es=False) for _ in range(2)]
    for asid in first:
        pool.give(asid)
    assert [pool.take(es=False) for _ in range(2)] == [5, 6], "fresh ones first"
    assert pool.take(es=False) == 3, "then all that wait are flushed at once"
    pool.give(3)
    assert pool.take(es=False) == 4 and pool.take(es=False) == 3 and refused(pool, False) == EBUSY


def test_flushing_one_range_frees_what_waits_in_the_other() -> None:
    pool = AsidPool(3, 3)
    pool.give(pool.take(es=True))
    pool.give(pool.take(es=False))
    assert pool.take(es=False) == 3 and pool.take(es=True) == 1, "not 2: 1 was flushed along"


def test_one_pool_per_machine() -> None:
    platforms, found = [Platform(), Platform()], []
    threads = [threading.Thread(target=lambda platform: found.append((platform, pool_of(platform))), args=(p,)) for p in platforms * 8]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(pool) for _, pool in found}) == 2


# ---- through the ioctls
def test_asids_run_out_and_come_back() -> None:
    host = ModelHost(Platform(asids=2, min_sev_asid=1))
    with Sev(host) as one, Sev(host, 0) as two, Sev(host) as three:
        assert one.init()[0] == two.init()[0] == 0
        assert three.init() == (EBUSY, UNTOUCHED) and three.init() == (EBUSY, UNTOUCHED)
        one.vm.close()
        assert three.init()[0] == 0
        assert two.init()[0] == EINVAL, "initialised already"


def test_es_has_asids_of_its_own() -> None:
    host = ModelHost(Platform(asids=3, min_sev_asid=3))
    with Sev(host, 3) as one, Sev(host, 0) as two, Sev(host, 3) as three, Sev(host) as other, Sev(host) as last:
        assert one.init()[0] == two.init(es=True)[0] == 0
        assert three.init()[0] == EBUSY and other.init()[0] == 0 and last.init()[0] == EBUSY


def test_a_vm_that_got_none_is_as_before() -> None:
    host = ModelHost(Platform(asids=1, min_sev_asid=1))
    with Sev(host) as one, Sev(host) as two:
        one.to("init")
        assert two.init()[0] == EBUSY
        assert two.op(sev.KVM_SEV_LAUNCH_FINISH) == (ENOTTY, UNTOUCHED), "no SEV guest"
        assert two.add_vcpu().ioctl_raw(ioctls.KVM_RUN, 0) == -EINVAL, "still waits for INIT2"
        one.vm.close()
        assert two.init() == (EINVAL, UNTOUCHED), "it has a vCPU now"


@pytest.mark.parametrize(("lowest", "number", "type"), [(4, sev.KVM_SEV_INIT, 2), (1, sev.KVM_SEV_ES_INIT, 3)])
def test_a_machine_without_one_kind(lowest: int, number: int, type: int) -> None:
    host = ModelHost(Platform(asids=3, min_sev_asid=lowest))
    with Sev(host, 0) as vm:
        assert vm.op(number) == (ENOTTY, UNTOUCHED)
        assert vm.system.ioctl_raw(ioctls.KVM_CREATE_VM, type) == -EINVAL
        assert vm.op(1 - number) == (0, UNTOUCHED)


def test_the_firmware_gets_the_asid(model_host: Any) -> None:
    with Sev(model_host) as one, Sev(model_host, 3) as two:
        one.to("started")
        two.to("started")
        guests = [model_host.platform.firmware.guest(vm.status()[0]) for vm in (one, two)]
        assert [guest.asid for guest in guests] == [5, 1]
    assert model_host.platform.firmware.guest_count == 0
