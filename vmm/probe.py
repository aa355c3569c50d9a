"""What a capability is worth: run a guest of two instructions and see.

KVM_CAP_EXIT_HYPERCALL can be offered by a kernel on which the hypercall never arrives: a paravirtual KVM without SVM and VMX spins on
`vmmcall` inside KVM_RUN. So before a guest that needs hypercalls is given to a kernel, this module runs

    vmmcall          ; RAX 12 (KVM_HC_MAP_GPA_RANGE), RBX 0, RCX 1, RDX 0
    hlt

in 64-bit mode (in real mode the same kernel ends the guest instead) on a scratch VM, with a kick after 50 ms. The answer is kept in the
user's cache folder under the boot id and the kernel's release, so it is paid once per boot; a cache that cannot be read or written is
no error.

The scratch VM is made with plain ioctls at the seam and everything is released before the answer is given.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import platform
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from kvmapi.abi import caps, ioctls, kvm, structs, vcpu
from kvmapi.buffers import HeaderAndEntries
from vmm import boot, kick

if TYPE_CHECKING:
    from kvmapi.host import Host

KICK_AFTER = 0.05
"""Seconds a hypercall may take; one that exits takes microseconds."""

_CODE = b"\x0f\x01\xd9\xf4"  # vmmcall; hlt
_ENTRY = 0x100000
_MEMORY = 16 << 20
_CPUID_ROOM = 256
_HYPERCALL_MASK = 1 << kvm.KVM_HC_MAP_GPA_RANGE


def hypercall_exits(host: Host, cache: bool = True) -> bool:
    """Whether a MAP_GPA_RANGE hypercall of a guest on `host` really reaches user space. Never raises: what cannot be asked is a no.

    `cache`: take the answer of an earlier call in the same boot, and remember this one; only a kernel's answer is remembered.
    """
    key = _key() if cache and host.name == "kernel" else ""
    known = _remembered().get(key) if key else None
    if isinstance(known, bool):
        return known
    try:
        answer = _ask(host)
    except OSError:
        return False
    if key:
        _remember(key, answer)
    return answer


def _ask(host: Host) -> bool:
    """Run the two instructions; raises OSError where a scratch VM cannot be had."""
    with ExitStack() as stack:
        system = host.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        stack.callback(host.close, system)
        vm = _result(host.ioctl(system, ioctls.KVM_CREATE_VM, 0))
        stack.callback(host.close, vm)
        if not _result(host.ioctl(vm, ioctls.KVM_CHECK_EXTENSION, caps.KVM_CAP_EXIT_HYPERCALL)) & _HYPERCALL_MASK:
            return False
        enable = structs.kvm_enable_cap(cap=caps.KVM_CAP_EXIT_HYPERCALL)
        enable.args[0] = _HYPERCALL_MASK
        _result(host.ioctl(vm, ioctls.KVM_ENABLE_CAP, ctypes.addressof(enable)))
        memory = mmap.mmap(-1, _MEMORY)
        stack.callback(memory.close)
        for gpa, page in boot.pages(boot.BootInfo(0, 0, _MEMORY, 1, 0), {}).items():
            memory[gpa : gpa + len(page)] = page
        memory[_ENTRY : _ENTRY + len(_CODE)] = _CODE
        region = structs.kvm_userspace_memory_region(memory_size=_MEMORY)
        region.userspace_addr = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        _result(host.ioctl(vm, ioctls.KVM_SET_USER_MEMORY_REGION, ctypes.addressof(region)))
        cpu = _result(host.ioctl(vm, ioctls.KVM_CREATE_VCPU, 0))
        stack.callback(host.close, cpu)
        _cpuid(host, system, cpu)
        _registers(host, cpu)
        run = host.mmap(cpu, _result(host.ioctl(system, ioctls.KVM_GET_VCPU_MMAP_SIZE, 0)), 3, mmap.MAP_SHARED, 0)
        stack.callback(run.close)
        return _run(host, cpu, run)


def _cpuid(host: Host, system: int, cpu: int) -> None:
    """What the host supports: without long mode in the guest's CPUID, KVM refuses a guest in long mode."""
    table = HeaderAndEntries(vcpu.kvm_cpuid2, vcpu.kvm_cpuid_entry2, _CPUID_ROOM)
    table.header.nent = _CPUID_ROOM
    _result(host.ioctl(system, ioctls.KVM_GET_SUPPORTED_CPUID, ctypes.addressof(table.header)))
    _result(host.ioctl(cpu, ioctls.KVM_SET_CPUID2, ctypes.addressof(table.header)))


def _registers(host: Host, cpu: int) -> None:
    sregs = vcpu.kvm_sregs()
    _result(host.ioctl(cpu, ioctls.KVM_GET_SREGS, ctypes.addressof(sregs)))
    boot.set_system_registers(sregs, 0, 1)
    _result(host.ioctl(cpu, ioctls.KVM_SET_SREGS, ctypes.addressof(sregs)))
    regs = vcpu.kvm_regs(rip=_ENTRY, rflags=2, rax=kvm.KVM_HC_MAP_GPA_RANGE, rbx=0, rcx=1, rdx=0)
    _result(host.ioctl(cpu, ioctls.KVM_SET_REGS, ctypes.addressof(regs)))


def _run(host: Host, cpu: int, run: mmap.mmap) -> bool:
    """KVM_RUN in a thread of its own, kicked until it is back; whether the exit was the hypercall's."""
    results: list[int] = []

    def body() -> None:
        kick.accept_kicks()
        results.append(host.ioctl(cpu, ioctls.KVM_RUN, 0))

    kick.kick_signal()
    thread = threading.Thread(target=body, name="probe", daemon=True)
    thread.start()
    thread.join(KICK_AFTER)
    while thread.is_alive():
        run[1:2] = b"\x01"  # kvm_run.immediate_exit
        kick.kick(thread.native_id or 0)
        thread.join(KICK_AFTER / 10)
    return bool(results) and results[0] == 0 and int.from_bytes(run[8:12], "little") == kvm.KVM_EXIT_HYPERCALL


def _result(result: int) -> int:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


# -- the cache ---------------------------------------------------------------------------------------------------------------------------


def _key() -> str:
    """This boot of this kernel; empty when the kernel does not say, and then nothing is remembered."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    return f"{boot} {platform.release()} hypercall"


def _file() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "sevmm" / "probes.json"


def _remembered() -> dict[str, object]:
    try:
        answers = json.loads(_file().read_text())
    except (OSError, ValueError, RuntimeError):  # RuntimeError: no home directory
        return {}
    return answers if isinstance(answers, dict) else {}


def _remember(key: str, answer: bool) -> None:
    """Write the answers of this boot only, in place at once, so that two processes never see half a file."""
    try:
        path = _file()
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".probes-{os.getpid()}")
        scratch.write_text(json.dumps({key: answer}))
        os.replace(scratch, path)
    except (OSError, RuntimeError):
        return
