"""What must not happen between the lines: registers seen through an ioctl that waited while its VM died, keys in a forked child, room lost
by launches that failed, plaintext that comes back in the vault's room.
"""

from __future__ import annotations

import os
import resource
import threading
import time
from errno import EIO
from typing import Any

import pytest

from kvmapi.abi import sev
from kvmapi.errors import KvmError
from kvmapi.model.host import ModelHost
from kvmapi.model.sev.firmware import Firmware
from tests.model.sev_vm import Family, Sev

pytestmark = pytest.mark.model


def test_an_ioctl_that_waited_while_its_vm_was_moved(family: Family) -> None:
    """Its registers are another VM's by then, whatever was asked."""
    source, target = family.guest(True), family.aux(4)
    inner = family.host.file(source.vcpus[0].fd)
    answers: list[int] = []
    before = inner._references

    def ask() -> None:
        try:
            source.vcpus[0].get_regs()
            answers.append(0)
        except KvmError as error:
            answers.append(error.errno)

    thread = threading.Thread(target=ask)
    with inner.mutex:
        thread.start()
        while inner._references == before and thread.is_alive():
            time.sleep(0.001)  # until it has been dispatched, and waits for the mutex
        inner.vm.sev.dead = True  # as a MOVE leaves it
    thread.join()
    inner.vm.sev.dead = False
    assert answers == [EIO]
    assert target.move(source) == 0


def test_a_forked_child_has_no_keys(model_host: Any) -> None:
    """Not in its memory, and not through a /dev/sev that it inherited: its platform is another one."""
    firmware = model_host.platform.firmware
    guest = firmware.launch_start(0, b"", b"")
    firmware.activate(guest, 5)
    page = guest.cipher.encrypt(0x1000, b"secret page data" * 256)
    chip = firmware.get_id()
    child = os.fork()
    if not child:
        plain = guest.cipher.decrypt(0x1000, page)
        os._exit(0 if plain[:16] != b"secret page data" and model_host.platform.firmware.get_id() != chip else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert guest.cipher.decrypt(0x1000, page) == b"secret page data" * 256
    assert firmware.get_id() == chip and model_host.platform.firmware is firmware


def test_a_child_of_a_process_in_the_middle_of_a_command(model_host: Any) -> None:
    """Locks and doors that others held stay the parent's."""
    firmware = model_host.platform.firmware
    with firmware.lock, firmware.vault.working():
        child = os.fork()
        if not child:
            os._exit(0 if len(model_host.platform.firmware.pdh_cert_export()[0]) == 2084 else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_launches_that_fail_lose_no_room() -> None:
    """As many as one likes, without a free fd."""
    host = ModelHost()
    vault = host.platform.firmware.vault
    with Sev(host) as vm:
        vm.to("init")
        used = vault._top
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            outcomes = {vm.op(sev.KVM_SEV_LAUNCH_START, sev.kvm_sev_launch_start(policy=0xFF << 16)) for _ in range(50)}
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert all(number for number, _ in outcomes) and vault._top == used
        assert vm.start() == (0, 0)
        assert vault._top == used + 64  # TEK, TIK and the memory's key


def test_the_vaults_room_forgets() -> None:
    """A page is worked on with the blocks before it in its unit: what stood there must not come back."""
    firmware = Firmware(15, 5)
    guest = firmware.launch_start(0, b"", b"")
    firmware.activate(guest, 5)
    guest.state = sev.SEV_STATE_SEND_UPDATE
    for at in (0, 0x1000):
        guest.send_update_data(at, guest.cipher.encrypt(at, b"page of secrets!" * 256))
    with firmware.vault.working() as work:
        assert b"secrets!" not in bytes(work.hidden)
