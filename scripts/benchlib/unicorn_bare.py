"""The bare engine as a yardstick: Unicorn with its virtual TLB, one loop, uc_emu_start once.

No hooks but one: without a TLB_FILL hook, a page of the virtual TLB is either readable or writable, and a loop that
loads and stores would do nothing but refill (some twenty times slower). So a fill maps one to one: what is fetched is
executable, the rest readable and writable.
"""

from __future__ import annotations

import ctypes
import time

from benchlib.bare import GuestFailed

MIB = 1 << 20
CODE, DATA, SIZE = 0x8000, MIB, 4 * MIB
_BUFFER = 64 * MIB  # of translated code; with the default of 1 GiB most engines are too far from the library for direct calls
_FILL = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _TlbEntry(ctypes.Structure):
    _fields_ = [("paddr", ctypes.c_uint64), ("perms", ctypes.c_uint32)]


def _fill(_uc: int, va: int, kind: int, entry: int, _data: int) -> bool:
    from unicorn import unicorn_const as uc

    slot = _TlbEntry.from_address(entry)
    slot.paddr = va
    slot.perms = uc.UC_PROT_READ | (uc.UC_PROT_EXEC if kind == uc.UC_MEM_FETCH else uc.UC_PROT_WRITE)
    return True


class Engine:
    """`loop` at CODE with 4 MiB of memory, data from 1 MiB."""

    def __init__(self, loop: bytes) -> None:
        from unicorn import Uc
        from unicorn import unicorn_const as uc
        from unicorn.unicorn_py3.unicorn import uclib

        self._end = CODE + len(loop)
        self._uc = Uc(uc.UC_ARCH_X86, uc.UC_MODE_64)
        self._uc.ctl_set_tcg_buffer_size(_BUFFER)
        self._uc.mem_map(0, SIZE)
        self._uc.ctl_set_tlb_mode(uc.UC_TLB_VIRTUAL)
        self._uc.mem_write(CODE, loop + b"\xf4")
        self._fill = _FILL(_fill)  # the class's own callbacks cost more; it must outlive the engine
        hook = ctypes.c_size_t()
        error = uclib.uc_hook_add(
            self._uc._uch, ctypes.byref(hook), uc.UC_HOOK_TLB_FILL, self._fill, None, ctypes.c_uint64(1), ctypes.c_uint64(0)
        )
        if error:
            raise GuestFailed(f"unicorn took no TLB_FILL hook: error {error}")

    def seconds(self) -> float:
        """Run the loop to the HLT behind it; how long that took."""
        from unicorn.x86_const import UC_X86_REG_RAX, UC_X86_REG_RBX, UC_X86_REG_RIP

        for register in (UC_X86_REG_RAX, UC_X86_REG_RBX):
            self._uc.reg_write(register, 0)
        began = time.perf_counter()
        self._uc.emu_start(CODE, self._end)
        elapsed = time.perf_counter() - began
        rip = self._uc.reg_read(UC_X86_REG_RIP)
        if not self._end <= rip <= self._end + 1:
            raise GuestFailed(f"unicorn stopped at {rip:#x}, not at the end of the loop")
        return elapsed
