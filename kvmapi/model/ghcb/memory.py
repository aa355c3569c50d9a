"""Guest memory as KVM itself sees it: through the VMM's mapping, where private pages are ciphertext.

That is the caller's memory whatever the guest and the VMM agreed on about the page: also where private memory has a backing
of its own (the RFC dialects), which the guest's accesses choose and KVM's do not.
"""

from __future__ import annotations

from kvmapi.model.caller import PAGE
from kvmapi.model.mem.physical import Physical, Refused
from kvmapi.model.mem.private import EncryptedPhysical
from kvmapi.model.mem.secure import page_view


def user_page(physical: Physical, gpa: int, write: bool) -> tuple[int, memoryview]:
    """(where our process sees it, bytes) of the page at `gpa`; valid until the next change. Raises Refused.

    The rule of the class itself, past what a dialect's subclass makes of it.
    """
    rule = EncryptedPhysical.locate if isinstance(physical, EncryptedPhysical) else Physical.locate
    window, offset, _ = rule(physical, gpa // PAGE, False, write)  # type: ignore[arg-type]
    pointer = window.pointer + offset
    return pointer, page_view(pointer)


def _pieces(gpa: int, size: int) -> list[tuple[int, int]]:
    """[gpa, gpa+size) cut at pages: (address, bytes)."""
    found = []
    while size:
        part = min(size, PAGE - gpa % PAGE)
        found.append((gpa, part))
        gpa, size = gpa + part, size - part
    return found


def read(physical: Physical, gpa: int, size: int) -> bytes:
    """kvm_read_guest. Raises Refused."""
    return b"".join(bytes(user_page(physical, at, False)[1][at % PAGE : at % PAGE + part]) for at, part in _pieces(gpa, size))


def write(physical: Physical, gpa: int, data: bytes | bytearray) -> set[int]:
    """kvm_write_guest, as far as it goes: what lies behind a page that cannot be written is not. The pages that were, as our
    process sees them.
    """
    done, touched = 0, set()
    for at, part in _pieces(gpa, len(data)):
        try:
            pointer, view = user_page(physical, at, True)
        except Refused:
            break
        view[at % PAGE : at % PAGE + part] = data[done : done + part]
        touched.add(pointer)
        done += part
    return touched
