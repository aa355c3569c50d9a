"""What a row of the ioctl table is, and how a row reads its argument.

One row per ioctl and kind of fd: wrappers, error messages, tracers, recorders and the software model all look at
the same row, so a request means one thing everywhere. A row says how the argument travels:

    none              there is none (pass 0)
    value             the argument itself is a number
    in, out, inout    it is the address of `struct`, read, filled, or both
    header+entries    the address of `struct` followed by `entry` elements, as many as the header's `count` field says
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Literal

from kvmapi.abi.encoding import IOC_READ, IOC_WRITE, decode_request

On = Literal["system", "vm", "vcpu", "device", "guest_memfd", "sev"]
ArgKind = Literal["none", "value", "in", "out", "inout", "header+entries"]
AnyStruct = type[ctypes.Structure] | type[ctypes.c_uint64]
EntryType = type[ctypes.Structure] | type[ctypes.c_uint64] | type[ctypes.c_uint32] | type[ctypes.c_uint8]


@dataclass(frozen=True, slots=True)
class Ioctl:
    """One ioctl on one kind of fd. `capability` is the name that KVM_CHECK_EXTENSION answers for it, if any."""

    name: str
    number: int
    on: On
    struct: AnyStruct | None
    arg: ArgKind
    capability: str | None
    words: str
    entry: EntryType | None = None
    count: str | None = None

    @property
    def size(self) -> int:
        """Bytes of the argument struct (of the header, if entries follow); 0 for a value."""
        return 0 if self.struct is None else ctypes.sizeof(self.struct)

    @property
    def reads(self) -> bool:
        """The kernel reads the caller's struct."""
        if self.arg == "header+entries":
            return bool(decode_request(self.number).direction & IOC_WRITE)
        return self.arg in ("in", "inout")

    @property
    def writes(self) -> bool:
        """The kernel writes the caller's struct (and entries)."""
        if self.arg == "header+entries":
            return bool(decode_request(self.number).direction & IOC_READ)
        return self.arg in ("out", "inout")

    def total_size(self, header: ctypes.Structure) -> int:
        """Bytes of the argument with the entries that its header announces."""
        if self.entry is None or self.count is None:
            return self.size
        return self.size + int(getattr(header, self.count)) * ctypes.sizeof(self.entry)


@dataclass(frozen=True, slots=True)
class Command:
    """A command inside a multiplexing ioctl (KVM_MEMORY_ENCRYPT_OP, SEV_ISSUE_CMD) and the struct `data` points to."""

    id: int
    name: str
    struct: type[ctypes.Structure] | None
    words: str


def _is_padding(name: str) -> bool:
    return name.startswith(("pad", "reserved", "rsvd"))


def _plain(value: object) -> object:
    """A field's value as Python data; byte arrays become their length, because they may hold secrets."""
    if isinstance(value, ctypes.Structure):
        return decode_struct(value)
    if isinstance(value, ctypes.Union):
        first = type(value)._fields_[0][0]
        return _plain(getattr(value, first))
    if isinstance(value, ctypes.Array):
        if value._type_ is ctypes.c_uint8:
            return f"<{len(value)} bytes>"
        return [_plain(item) for item in value]
    return value


def decode_struct(struct: ctypes.Structure) -> dict[str, object]:
    """The fields of an argument struct as a dict for people: no padding, no contents of byte buffers.

    Of a union the first member is shown. Numbers stay numbers; `kvmapi.errors` chooses hex or decimal.

    >>> from kvmapi.abi.structs import kvm_enc_region
    >>> decode_struct(kvm_enc_region(0x1000, 4096))
    {'addr': 4096, 'size': 4096}
    """
    fields: dict[str, object] = {}
    anonymous = getattr(struct, "_anonymous_", ())
    for field in struct._fields_:
        name = field[0]
        if _is_padding(name):
            continue
        if name in anonymous:
            union = getattr(struct, name)
            first = type(union)._fields_[0][0]
            fields[first] = _plain(getattr(union, first))
        else:
            fields[name] = _plain(getattr(struct, name))
    return fields


Argument = int | ctypes.Structure | ctypes.c_uint64 | None


def decode_argument(row: Ioctl, argument: Argument) -> dict[str, object]:
    """What was passed to `row`, as a dict: a value under "arg", a struct by its fields, nothing as {}."""
    if argument is None or row.arg == "none":
        return {}
    if isinstance(argument, ctypes.Structure):
        return decode_struct(argument)
    if isinstance(argument, int):
        return {"arg": argument}
    return {"arg": argument.value}
