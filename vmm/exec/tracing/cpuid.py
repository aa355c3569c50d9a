"""What the CPUID instruction answers in a program under `sevmm exec`: the modelled machine's, not this one's.

Programs that speak to KVM look at the processor themselves: which hypercall is its own, where the C-bit is, how wide
physical addresses are. On another processor than the modelled one such a program asks the model for what it does not
have. Linux can make CPUID fault (arch_prctl(ARCH_SET_CPUID), where the processor has that), and tracer.py answers it
with what is told here.

A program also chooses its own code by CPUID, and that code runs on *this* machine. So features that user code can use are
told only where both have them, and the size of XSAVE's area and the topology are this machine's.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

Answer = tuple[int, int, int, int]  # EAX, EBX, ECX, EDX
Cpuid = Callable[[int, int], Answer]

_CODE = bytes.fromhex("53 4989d0 89f8 89f1 0fa2 418900 41895804 41894808 4189500c 5b c3")
# push rbx; mov r8, rdx; mov eax, edi; mov ecx, esi; cpuid; mov [r8], eax; mov [r8+4], ebx; mov [r8+8], ecx; mov [r8+12], edx; pop rbx; ret
_THIS_MACHINES = frozenset((0xB, 0xD))
_REPEATED = 0x0183F3FF  # features that AMD's leaf 0x80000001 repeats from leaf 1
_PRIVILEGED_1_ECX = 1 << 3  # MWAIT: nothing that user code could execute
_PRIVILEGED_X1_ECX = 1 << 2  # SVM: neither
_OSXSAVE = 1 << 27  # this kernel's doing: XGETBV works here or not


@functools.cache
def _native() -> tuple[Callable[[int, int, object], None], mmap.mmap] | None:
    """A function that executes CPUID here, and the memory it is in; None where memory cannot be made executable."""
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return None
    page.write(_CODE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)(address), page


def native(function: int, index: int) -> Answer:
    """This machine's answer; all zeroes where it cannot be asked."""
    execute, registers = _native(), (ctypes.c_uint32 * 4)()
    if execute is not None:
        execute[0](function, index, ctypes.addressof(registers))
    return (registers[0], registers[1], registers[2], registers[3])


def seen(model: Cpuid, here: Cpuid, function: int, index: int) -> Answer:
    """What the program sees of a machine whose own answer is `model`'s, on a machine whose is `here`'s."""
    if function in _THIS_MACHINES:
        return here(function, index)
    eax, ebx, ecx, edx = model(function, index)
    if function == 1:
        _, mine, features_c, features_d = here(1, 0)
        return eax, mine, ecx & (features_c | _PRIVILEGED_1_ECX) | features_c & _OSXSAVE, edx & features_d
    if function == 7:
        _, features_b, features_c, features_d = here(7, index)
        return eax, ebx & features_b, ecx & features_c, edx & features_d
    if function == 0x80000001:
        _, _, features_c, features_d = here(function, 0)
        return eax, ebx, ecx & (features_c | _PRIVILEGED_X1_ECX), edx & (features_d | _REPEATED)
    return eax, ebx, ecx, edx
