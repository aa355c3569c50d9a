"""Hooks in machine code: a Python call per block, or per stop, would dominate everything else.

- The *kick stub* runs at the start of every block. It looks at two bytes of the kvm_run page, immediate_exit and our
  own kick beside it, and asks the engine to stop when either is set: the guest stops exactly at a block boundary,
  which an uc_emu_stop from another thread does not do (it rewinds half-done instructions).
- The *stop stub* stands before a sensitive instruction: it asks the engine to stop and leaves the block at once, as if
  the engine had looked for stop requests there.
- The *watch stub* is a stop stub that counts only while somebody waits for what the instruction may do (events.py).

Each is called as a hook is: rdi the engine, rcx the hook's data. They live in one executable page per process.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from typing import NamedTuple

from unicorn.unicorn_py3 import unicorn as _binding

from kvmapi.model.cpu.layout import EngineMismatch

_lib = _binding.uclib
_STOP_AT, _WATCH_AT = 32, 96


class Stubs(NamedTuple):
    """Addresses of the three, and the page that holds them."""

    kick: int
    stop: int
    watch: int
    page: mmap.mmap


def exported(name: str) -> int:
    """The address of a function of Unicorn's. Raises EngineMismatch."""
    try:
        function = getattr(_lib, name)
    except AttributeError:
        raise EngineMismatch(f"the installed unicorn has no {name}: install it with `pip install unicorn==2.1.4`") from None
    return ctypes.cast(function, ctypes.c_void_p).value or 0


@functools.cache
def stubs() -> Stubs:
    """Made on first use. Raises EngineMismatch."""
    ask = b"\x48\xb8" + exported("uc_emu_stop").to_bytes(8, "little")  # mov rax, uc_emu_stop
    leave = b"\x48\xb8" + exported("helper_check_exit_request_x86_64").to_bytes(8, "little")  # mov rax, helper
    kick = b"\x66\x83\x39\x00\x75\x01\xc3" + ask + b"\xff\xe0"  # cmp word [rcx], 0; jne +1; ret; ask; jmp rax
    stop = b"\x57" + ask + b"\xff\xd0\x5f\x31\xf6" + leave + b"\xff\xe0"  # push rdi; ask; call rax; pop rdi; xor esi, esi; leave; jmp rax
    watch = b"\x83\x39\x00\x75\x01\xc3\xe9" + (_STOP_AT - _WATCH_AT - 11).to_bytes(4, "little", signed=True)  # cmp dword [rcx], 0; ...
    protection = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=protection)
    for at, code in ((0, kick), (_STOP_AT, stop), (_WATCH_AT, watch)):
        page[at : at + len(code)] = code
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return Stubs(address, address + _STOP_AT, address + _WATCH_AT, page)


def quiet_offset() -> int:
    """Where the engine's structure has the flag that keeps it from looking for stop requests after each memory access
    (`no_exit_request`): read from the code of the function that looks at it. Raises EngineMismatch.
    """
    code = ctypes.string_at(exported("check_exit_request_x86_64"), 32)
    at = code.find(b"\x80\xbe")  # cmp byte [rsi + offset], 0
    offset = int.from_bytes(code[at + 2 : at + 6], "little")
    if at < 0 or code[at + 6] or offset >= mmap.PAGESIZE:
        raise EngineMismatch("the installed unicorn looks for stop requests in another way: install it with `pip install unicorn==2.1.4`")
    return offset
