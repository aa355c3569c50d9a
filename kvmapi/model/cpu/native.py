"""Unicorn's C interface, called without the Python class around it.

The class costs several µs per call (argument checks, closures per register); an exit of the model should cost little
more than that. So the few functions it needs are prototyped once here. Everything is a thin call: policy lives in
cpu.py.

`Native.state` is the engine's CPU structure itself (layout.py), live: between two starts it holds the registers, and
what is written there is what the guest goes on with. Inside a callback it is as current as the engine can make it (RIP
is not).

Hooks that are called per block or per stop are machine code, not Python: stubs.py.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections.abc import Callable, Collection

import unicorn.unicorn_const as uc
from unicorn.unicorn_py3 import unicorn as _binding

from kvmapi.model.cpu.layout import EngineMismatch
from kvmapi.model.cpu.stubs import stubs

_lib = _binding.uclib
_u64, _ptr, _int = ctypes.c_uint64, ctypes.c_void_p, ctypes.c_int
TlbFill = ctypes.CFUNCTYPE(ctypes.c_bool, _ptr, _u64, _int, _ptr, _ptr)
Interrupt = ctypes.CFUNCTYPE(None, _ptr, ctypes.c_uint32, _ptr)
MemoryAccess = ctypes.CFUNCTYPE(None, _ptr, _int, _u64, _int, ctypes.c_int64, _ptr)


class TlbEntry(ctypes.Structure):
    """What a TLB_FILL hook fills in: physical address and UC_PROT_* bits."""

    _fields_ = [("paddr", _u64), ("perms", ctypes.c_uint32)]


def _prototype(name: str, *arguments: type, result: type | None = _int) -> Callable[..., int]:
    function: Callable[..., int] = ctypes.CFUNCTYPE(result, *arguments)((name, _lib))
    return function


_open = _prototype("uc_open", _int, _int, _ptr)
_close = _prototype("uc_close", _ptr)
_start = _prototype("uc_emu_start", _ptr, _u64, _u64, _u64, ctypes.c_size_t)
_stop = _prototype("uc_emu_stop", _ptr)
_reg_write = _prototype("uc_reg_write", _ptr, _int, _ptr)
_reg_read = _prototype("uc_reg_read", _ptr, _int, _ptr)
_map_ptr = _prototype("uc_mem_map_ptr", _ptr, _u64, ctypes.c_size_t, ctypes.c_uint32, _ptr)
_unmap = _prototype("uc_mem_unmap", _ptr, _u64, ctypes.c_size_t)
_context_alloc = _prototype("uc_context_alloc", _ptr, _ptr)
_context_free = _prototype("uc_context_free", _ptr)
_context_size = _prototype("uc_context_size", _ptr, result=ctypes.c_size_t)
_context_save = _prototype("uc_context_save", _ptr, _ptr)
_hook_del = _prototype("uc_hook_del", _ptr, ctypes.c_size_t)
_strerror = _prototype("uc_strerror", _int, result=ctypes.c_char_p)
_hook_add = _lib.uc_hook_add  # variadic: arguments are wrapped at the call
_ctl = _lib.uc_ctl  # variadic
_WRITE = uc.UC_CTL_IO_WRITE << 30

CODE_BYTES = 64 << 20
_SLACK = 16 << 20  # bytes that an engine needs besides
_NORESERVE = 0x4000
"""Room for translated code. Not more: code further than 2 GiB from our stubs calls them by a slower way, and Unicorn's own
choice of 1 GiB puts every second engine there."""

_LONGEST = 15  # bytes of an instruction
_CONTEXT_HEADER = 40  # of a saved context, before the copy of the CPU structure
_ENGINE_BYTES, _OBJECT_BYTES = 4096, 1 << 17  # of the engine's structure and of its CPU object: where to search
_MARK = 0x53_65_76_4D_4D_4D_4D_01
_REG_EFLAGS, _REG_RAX, _REG_MSR = 25, 35, 248  # UC_X86_REG_EFLAGS, _RAX, _MSR (their module takes 10 ms to import)


@functools.lru_cache(maxsize=1)
def own_memory(pid: int) -> int:
    """An fd of our own memory, opened once per process (`pid`): later it may be forbidden, even for ourselves."""
    return os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)


_places: list[tuple[int, int]] = []  # offset of the CPU's pointer in the engine, and of the state in what it points to


def _locate_state(handle: int, copy: bytes) -> int:
    """Where the CPU structure stands whose contents are `copy`: behind a pointer in the engine's structure. The same
    one in every engine, so it is searched for once. Other copies may lie about in memory: only the structure itself
    follows when RAX is written. All reads go through /proc, so that a wild pointer is no crash.
    """
    fd = own_memory(os.getpid())
    engine = os.pread(fd, _ENGINE_BYTES, handle)

    def live(at: int, offset: int) -> int:
        address = int.from_bytes(engine[at : at + 8], "little") + offset
        mark = ctypes.c_uint64(_MARK)
        _reg_write(handle, _REG_RAX, ctypes.addressof(mark))
        followed = _peek(fd, address, 8) == bytes(mark) and _peek(fd, address + 8, len(copy) - 8) == copy[8:]
        mark.value = int.from_bytes(copy[:8], "little")
        _reg_write(handle, _REG_RAX, ctypes.addressof(mark))
        return address if followed else 0

    for place in _places:
        if address := live(*place):
            return address
    for at in range(0, len(engine) - 7, 8):
        area = _peek(fd, int.from_bytes(engine[at : at + 8], "little"), _OBJECT_BYTES)
        offset = area.find(copy)
        while offset >= 0:
            if address := live(at, offset):
                _places.append((at, offset))
                return address
            offset = area.find(copy, offset + 1)
    raise EngineMismatch("the installed unicorn hides its CPU structure: install it with `pip install unicorn==2.1.4`")


def _peek(fd: int, address: int, size: int) -> bytes:
    try:
        return os.pread(fd, size, address) if mmap.PAGESIZE <= address < 1 << 47 else b""
    except OSError:
        return b""


class Native:
    """One Unicorn x86-64 engine in virtual-TLB mode. Not thread-safe: one caller at a time."""

    def __init__(self, code_bytes: int = CODE_BYTES) -> None:
        """`code_bytes`: room for translated code. OSError (ENOMEM): there is none."""
        self.handle = 0
        # Where this fails, under a small `ulimit -v`, the engine would end the whole process.
        mmap.mmap(-1, code_bytes + _SLACK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE).close()
        handle = _ptr()
        self._check(_open(uc.UC_ARCH_X86, uc.UC_MODE_64, ctypes.addressof(handle)), "open an engine")
        self.handle = handle.value or 0
        self._callbacks: list[object] = []  # ctypes callbacks must outlive the engine
        # Before the engine sets itself up, which the first call that needs its CPU does.
        self.control(uc.UC_CTL_TCG_BUFFER_SIZE, ctypes.c_uint32(code_bytes))
        copy = self._copy_of_state()
        address = _locate_state(self.handle, copy)
        self.state = memoryview((ctypes.c_ubyte * len(copy)).from_address(address)).cast("B")
        self._scratch = ctypes.create_string_buffer(64)
        self._scratch_at = ctypes.addressof(self._scratch)
        self.control(uc.UC_CTL_TLB_TYPE, _int(uc.UC_TLB_VIRTUAL))
        self.control(uc.UC_CTL_UC_USE_EXITS, _int(1))  # otherwise `until` costs a TLB fill of its own

    def _copy_of_state(self) -> bytes:
        """What Unicorn's own uc_context_save says the CPU structure holds."""
        context = _ptr()
        size = _context_size(self.handle)
        self._check(_context_alloc(self.handle, ctypes.addressof(context)), "allocate a context")
        try:
            self._check(_context_save(self.handle, context.value), "save a context")
            return ctypes.string_at((context.value or 0) + _CONTEXT_HEADER, size - _CONTEXT_HEADER)
        finally:
            _context_free(context.value)

    @staticmethod
    def _check(error: int, what: str) -> None:
        if error:
            text = _strerror(error)
            raise EngineMismatch(f"unicorn could not {what}: {bytes(text).decode() if text else error}")

    def close(self) -> None:
        """Free the engine and everything translated. Safe to call twice."""
        if self.handle:
            self.state.release()
            _close(self.handle)
            self.handle = 0
            self._callbacks.clear()

    def __del__(self) -> None:
        self.close()

    # ---- running
    def start(self, rip: int) -> int:
        """Run from `rip` until a hook stops it; a UC_ERR_* number. Releases the GIL."""
        return _start(self.handle, rip, 0, 0, 0)

    def end_blocks_after(self, linear: int, fetchable: int) -> None:
        """Translate no further than the instruction at the linear address `linear`, of which `fetchable` bytes can be
        fetched: whatever follows is an exit. (After a run the engine looks at the byte before each exit: it must be
        there.)
        """
        self.set_exits(range(linear + 1, linear + 1 + min(_LONGEST, fetchable)))

    def quieten(self, offset: int) -> None:
        """Do not look for stop requests after each memory access, which costs as much as the access: stop stubs leave
        by themselves. `offset` is stubs.quiet_offset.
        """
        ctypes.c_uint8.from_address(self.handle + offset).value = 1

    def stop(self) -> None:
        """Only from inside a callback: stopping from outside tears instructions apart."""
        _stop(self.handle)

    # ---- state
    def flags(self) -> int:
        """RFLAGS, with the lazily computed condition codes."""
        _reg_read(self.handle, _REG_EFLAGS, self._scratch_at)
        return int.from_bytes(self._scratch.raw[:4], "little")

    def write_register(self, register: int, value: int) -> None:
        self._scratch.raw = value.to_bytes(64, "little")
        self._check(_reg_write(self.handle, register, self._scratch_at), "write a register")

    def write_wide(self, register: int, value: bytes) -> None:
        self._scratch.raw = value
        self._check(_reg_write(self.handle, register, self._scratch_at), "write a wide register")

    def write_msr(self, number: int, value: int) -> None:
        self._scratch.raw = number.to_bytes(8, "little") + value.to_bytes(8, "little")
        self._check(_reg_write(self.handle, _REG_MSR, self._scratch_at), "write an MSR")

    def read_msr(self, number: int) -> int:
        self._scratch.raw = number.to_bytes(8, "little")
        self._check(_reg_read(self.handle, _REG_MSR, self._scratch_at), "read an MSR")
        return int.from_bytes(self._scratch.raw[8:16], "little")

    def fault_address(self, offset: int) -> int:
        """The address of the last refused access; `offset` is where calibration found it in the engine's structure."""
        return ctypes.c_uint64.from_address(self.handle + offset).value

    # ---- memory and caches
    def map(self, base: int, size: int, pointer: int) -> None:
        """Make host memory at `pointer` the engine's physical [base, base+size)."""
        self._check(_map_ptr(self.handle, base, size, uc.UC_PROT_ALL, pointer), "map memory")

    def unmap(self, base: int, size: int) -> None:
        self._check(_unmap(self.handle, base, size), "unmap memory")

    def control(self, what: int, *arguments: object) -> int:
        return int(_ctl(_ptr(self.handle), what | len(arguments) << 26 | _WRITE, *arguments))

    def flush_tlb(self) -> None:
        self.control(uc.UC_CTL_TLB_FLUSH)

    def flush_code(self) -> None:
        """Throw away every translated block."""
        self.control(uc.UC_CTL_TB_FLUSH)

    # ---- hooks
    def _hook(self, kind: int, callback: object, data: int, begin: int, end: int) -> int:
        handle = ctypes.c_size_t()
        error = _hook_add(_ptr(self.handle), ctypes.byref(handle), kind, callback, _ptr(data), _u64(begin), _u64(end))
        self._check(error, "add a hook")
        return handle.value

    def hook_tlb_fill(self, callback: object, data: int = 0) -> None:
        """`callback`: a TlbFill, or the address of machine code."""
        self._callbacks.append(callback)
        self._hook(uc.UC_HOOK_TLB_FILL, _ptr(callback) if isinstance(callback, int) else callback, data, 1, 0)

    def hook_interrupts(self, function: Callable[[int, int, int], None]) -> None:
        callback = Interrupt(function)
        self._callbacks.append(callback)
        self._hook(uc.UC_HOOK_INTR, callback, 0, 1, 0)

    def hook_memory(self, function: Callable[[int, int, int, int, int, int], None]) -> tuple[int, object]:
        """Report every data access until `unhook`; the second value keeps the callback alive."""
        callback = MemoryAccess(function)
        return self._hook(uc.UC_HOOK_MEM_READ | uc.UC_HOOK_MEM_WRITE, callback, 0, 1, 0), callback

    def hook_code(self, address: int, function: int) -> int:
        """Call the machine code at `function` before the instruction at virtual `address`."""
        return self._hook(uc.UC_HOOK_CODE, _ptr(function), 0, address, address)

    def hook_code_anywhere(self, function: int, data: int) -> int:
        """The same before every instruction."""
        return self._hook(uc.UC_HOOK_CODE, _ptr(function), data, 1, 0)

    def hook_stop_at(self, address: int) -> int:
        """Stop before the instruction at virtual `address`, with no Python in the way."""
        return self.hook_code(address, stubs().stop)

    def hook_kick(self, address: int) -> None:
        """Stop at the next block whenever one of the two bytes at `address` is not zero."""
        self._hook(uc.UC_HOOK_BLOCK, _ptr(stubs().kick), address, 1, 0)

    def hook_stores_at(self, address: int) -> int:
        """Keep the engine looking at every store to the page at its physical `address`, not only at the first one: it
        does where any memory hook is, and this one never fires.
        """
        return self._hook(uc.UC_HOOK_MEM_FETCH_UNMAPPED, _ptr(stubs().stop), 0, address, address + mmap.PAGESIZE - 1)

    def set_exits(self, addresses: Collection[int]) -> None:
        """Stop before these linear addresses, and do not translate what stands there."""
        exits = (_u64 * max(1, len(addresses)))(*addresses)
        self.control(uc.UC_CTL_UC_EXITS, _ptr(ctypes.addressof(exits)), ctypes.c_size_t(len(addresses)))

    def unhook(self, handle: int) -> None:
        _hook_del(self.handle, handle)
