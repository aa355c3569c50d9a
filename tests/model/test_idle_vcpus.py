"""vCPUs that nobody asks anything have no processor; the first ioctl makes exactly one."""

from __future__ import annotations

import threading
from typing import Any

from kvmapi.abi import ioctls
from kvmapi.model.vcpu import VcpuFile
from tests.conformance.snippets import Machine

MANY = 200


def file_of(host: Any, fd: int) -> VcpuFile:
    """The model's file behind a vCPU's fd."""
    file = host.file(fd)
    assert isinstance(file, VcpuFile)
    return file


def made(file: VcpuFile) -> bool:
    return "cpu" in vars(file)


def test_idle_vcpus_have_no_processor(model_host: Any, no_leaks: None) -> None:
    with Machine(model_host) as machine:
        machine.vm.create_irqchip()
        vcpus = [machine.vm.create_vcpu(number) for number in range(MANY)]
        machine.vcpus += vcpus
        assert not any(made(file_of(model_host, vcpu.fd)) for vcpu in vcpus)
        assert machine.vm.signal_msi(0xFEEFF000, 0x30) == 0, "software-disabled APICs take nothing"
        assert machine.vm.signal_msi(0xFEE00000 | 5 << 12, 4 << 8) == 1, "an NMI"
        assert not made(file_of(model_host, vcpus[5].fd)), "pending is kept elsewhere"
        assert vcpus[5].get_regs().rip == 0xFFF0
        assert made(file_of(model_host, vcpus[5].fd)) and not made(file_of(model_host, vcpus[6].fd))


def test_the_first_ioctl_from_many_threads(model_host: Any) -> None:
    with Machine(model_host) as machine:
        machine.vcpus.append(machine.vm.create_vcpu(0))
        fd = machine.vcpu.fd
        seen: list[int] = []
        start = threading.Barrier(8)

        def ask() -> None:
            start.wait()
            seen.append(model_host.ioctl(fd, ioctls.KVM_GET_TSC_KHZ))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(seen)) == 1 and seen[0] > 0
        file = file_of(model_host, fd)
        assert file.state._cpu is file.cpu
        assert model_host.ioctl(fd, 0xAE00 | 0xFE) == -22
