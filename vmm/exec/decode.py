"""An ioctl as data for a log: its name, the fields of its argument, and what came back, read from the caller's memory.

What is never followed: pointers to payload. Guest memory, secrets, sessions, certificates and keys appear as the address and
the length that the caller passed; byte arrays inside a struct as their length. The one pointer that is followed is `data` of
KVM_MEMORY_ENCRYPT_OP and of SEV_ISSUE_CMD, which leads to the command's own struct. Of an exit the guest's data appears only
where it is one item of port or MMIO (at most 8 bytes); instruction bytes and strings of items by their length. What user
space answers to such an exit, and registers that travel in kvm_run, are not shown when KVM_RUN begins. And what a call only
fills in is not shown before it has: until then it is whatever the program had there before.

Everything is bounded: a caller may announce 2^32 entries, but no more than MOST_ENTRIES are read. Memory that cannot be read
is said to be so and stops nothing: the model answers EFAULT by itself.

Numbers: addresses, flags, masks and register values are hex strings, because readers such as jq keep 53 bits; counts,
lengths, sizes and fds are numbers; capabilities and VM types have their names.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import struct
from collections.abc import Callable
from typing import Any

from kvmapi import exits
from kvmapi.abi import caps, dialects, kvm
from kvmapi.abi.ioctls import KVM_MEMORY_ENCRYPT_OP
from kvmapi.abi.psp import SEV_ISSUE_CMD, sev_issue_cmd, sev_user_data_snp_status, sev_user_data_status
from kvmapi.abi.run import kvm_run
from kvmapi.abi.sev import kvm_sev_cmd
from kvmapi.abi.vcpu import kvm_msr_entry
from kvmapi.errors import ExitError, firmware_words
from kvmapi.model.caller import Errno
from kvmapi.rows import Ioctl, decode_struct
from kvmapi.table import any_row, command, row

Read = Callable[[int, int], bytes]
Fields = dict[str, Any]

MOST_ENTRIES = 64
_MOST_ITEMS = 32
_COUNTS = frozenset({
    "slot", "id", "nr", "irq", "gsi", "nmsrs", "nent", "len", "count", "sev_fd", "fd", "guest_memfd", "resamplefd", "size", "memory_size",
    "nr_xcrs", "errno", "entries", "suberror", "ndata", "cpl", "datamatch_len", "num_pages",
})  # fmt: skip
_MULTIPLEXED = {KVM_MEMORY_ENCRYPT_OP: kvm_sev_cmd, SEV_ISSUE_CMD: sev_issue_cmd}
_UNREADABLE: Fields = {"unreadable": True}
_FILLED_IN: dict[str, frozenset[str]] = {
    "KVM_GET_IRQCHIP": frozenset({"chip"}),
    "KVM_CREATE_DEVICE": frozenset({"fd"}),
    "KVM_XEN_HVM_GET_ATTR": frozenset({"u"}),
    "KVM_XEN_VCPU_GET_ATTR": frozenset({"u"}),
    "KVM_TRANSLATE": frozenset({"physical_address", "valid", "writeable", "usermode"}),
    "KVM_GET_NESTED_STATE": frozenset({"flags", "format", "hdr"}),
    "KVM_SEV_GUEST_STATUS": frozenset({"handle", "policy", "state"}),
    "SEV_PLATFORM_STATUS": frozenset(name for name, *_ in sev_user_data_status._fields_),
    "SNP_PLATFORM_STATUS": frozenset(name for name, *_ in sev_user_data_snp_status._fields_),
    "SEV_GET_ID": frozenset({"socket1", "socket2"}),
}
"""Fields of structs that go both ways, or of a command's, which the caller does not set."""

_ASKED = struct.Struct("<BB14xQ")  # request_interrupt_window, immediate_exit, cr8: the beginning of kvm_run
_SYNC = struct.Struct("<QQ")  # kvm_valid_regs, kvm_dirty_regs
_SYNC_AT = kvm_run.kvm_valid_regs.offset
_SYNC_NAMES = {kvm.KVM_SYNC_X86_REGS: "regs", kvm.KVM_SYNC_X86_SREGS: "sregs", kvm.KVM_SYNC_X86_EVENTS: "events"}


@dataclasses.dataclass(slots=True)
class Call:
    """One ioctl, before it was made: `name`, the `command` inside it if it is one of the two with commands, and `fields`."""

    name: str
    command: str | None
    fields: Fields
    row: Ioctl | None
    struct: type[ctypes.Structure] | None = None  # the command's
    address: int = 0  # of that struct


class Decoder:
    """Reads arguments. `dialect`: whose rows stand in for mainline's where they differ."""

    def __init__(self, dialect: str = "mainline") -> None:
        self._rows = {
            made.number: Ioctl(made.name, made.number, "vm", made.struct, made.arg, None, made.words)
            for made in dialects.dialect(dialect).calls
        }

    def before(self, kind: str, request: int, argument: int, read: Read) -> Call:
        """The ioctl `request` with `argument` on a fd of `kind` (rows.On), as it comes in."""
        request &= 0xFFFF_FFFF
        found = (self._rows.get(request) if kind == "vm" else None) or row(kind, request) or any_row(request)
        if found is None:
            return Call(f"{request:#010x}", None, {"arg": hex(argument)} if argument else {}, None)
        if found.number in _MULTIPLEXED:
            return _command(found, argument, read)
        fields: Fields = {}
        if found.arg == "value":
            fields = {"arg": _number(found.name, "arg", argument)}
        elif found.reads:
            fields = _given(found.name, _struct(found, argument, read, filled=not found.writes))
        return Call(found.name, None, fields, found)

    def after(self, call: Call, argument: int, result: int, read: Read) -> Fields:
        """What came back: a struct that was only written as a whole, one that goes both ways by the fields that changed."""
        if call.row is None or call.row.arg in ("none", "value", "in"):
            return {}
        if call.row.number in _MULTIPLEXED:
            return _command_result(call, argument, result, read)
        if result < 0 and (not call.row.reads or -result == errno.EFAULT):
            return {}
        found = _struct(call.row, argument, read, filled=result >= 0) if call.row.writes else {}
        if result < 0:
            found = _given(call.name, found)
        elif call.row.entry is kvm_msr_entry and isinstance(entries := found.get("entries"), list):
            found["entries"] = entries[:result]  # so many were read
        return {name: value for name, value in found.items() if name not in call.fields or call.fields[name] != value}


def run_fields(run: exits.Mapping) -> Fields:
    """What the caller of KVM_RUN asks for in kvm_run, as far as it is not zero; which registers, not their values."""
    window, immediate, cr8 = _ASKED.unpack_from(run, 0)
    valid, dirty = _SYNC.unpack_from(run, _SYNC_AT)
    fields: Fields = {"request_interrupt_window": window, "immediate_exit": immediate, "cr8": hex(cr8) if cr8 else 0}
    fields.update(kvm_valid_regs=_sync_sets(valid), kvm_dirty_regs=_sync_sets(dirty))
    return {name: value for name, value in fields.items() if value}


def exit_fields(run: exits.Mapping, result: int) -> Fields:
    """The exit in kvm_run, by name and fields; `result` is what KVM_RUN returned."""
    try:
        found = exits.decode(run, -result if result < 0 else 0)
    except ExitError as contradiction:
        return {"reason": "unreadable", "words": str(contradiction)}
    fields: Fields = {"reason": found.name}
    if not dataclasses.is_dataclass(found):
        return fields
    for field in dataclasses.fields(found):
        fields[field.name] = _plain(found.name, field.name, getattr(found, field.name))
    if isinstance(found, exits.Io | exits.Mmio):
        one = isinstance(found, exits.Mmio) or found.count == 1
        fields["data"] = f"0x{found.data[::-1].hex()}" if one else f"<{len(found.data)} bytes>"
        if not found.data:  # it is read by the guest: user space has yet to say what
            del fields["data"]
    if isinstance(found, exits.InternalError):
        fields["suberror"] = found.suberror_name
    if isinstance(found, exits.InternalError) and found.insn_bytes:
        fields["data"] = f"<{len(found.data)} items>"  # the instruction's bytes are among them
    return fields


# --- parts -----------------------------------------------------------------------------------------------------------


def _given(name: str, fields: Fields) -> Fields:
    """Without what only the answer fills in."""
    return {field: value for field, value in fields.items() if field not in _FILLED_IN.get(name, ())}


def _struct(found: Ioctl, address: int, read: Read, filled: bool = True) -> Fields:
    """The struct of `found` at `address`, with as many of its entries as are bearable; `filled`: do they hold something yet? Of
    KVM_GET_MSRS the indices do before.
    """
    if found.struct is None:
        return {}
    try:
        made = found.struct.from_buffer_copy(read(address, found.size))
        if isinstance(made, ctypes.c_uint64):
            return {"value": hex(made.value)}
        fields = {name: _plain(found.name, name, value) for name, value in decode_struct(made).items()}
        if found.entry is not None and found.count is not None and (filled or found.entry is kvm_msr_entry):
            fields["entries"] = _entries(found, int(getattr(made, found.count)), address + found.size, read, filled)
    except Errno:
        return dict(_UNREADABLE)
    return fields


def _entries(found: Ioctl, count: int, address: int, read: Read, filled: bool) -> object:
    if found.entry is None or found.entry is ctypes.c_uint8 or not count:
        return f"<{count} bytes>" if count else []
    size, shown = ctypes.sizeof(found.entry), min(count, MOST_ENTRIES)
    data = read(address, size * shown)
    made: list[object] = []
    for at in range(shown):
        entry = found.entry.from_buffer_copy(data, at * size)
        plain = _plain(found.name, "", decode_struct(entry) if isinstance(entry, ctypes.Structure) else entry.value)
        made.append(plain if filled or not isinstance(plain, dict) else {"index": plain["index"]})
    return [*made, f"and {count - shown} more"] if count > shown else made


def _command(found: Ioctl, argument: int, read: Read) -> Call:
    """KVM_MEMORY_ENCRYPT_OP or SEV_ISSUE_CMD: the command's number, and its struct."""
    try:
        made = _MULTIPLEXED[found.number].from_buffer_copy(read(argument, found.size))
    except Errno:
        return Call(found.name, None, dict(_UNREADABLE), found)
    number = made.id if isinstance(made, kvm_sev_cmd) else made.cmd
    known = command(found.number, number)
    call = Call(found.name, known.name if known else f"command {number}", {}, found)
    if known is not None and known.struct is not None:
        call.struct, call.address = known.struct, made.data
        call.fields = _given(known.name, _command_struct(call, read))
    elif made.data:
        call.fields["data"] = hex(made.data)
    if isinstance(made, kvm_sev_cmd) and made.sev_fd:
        call.fields["sev_fd"] = made.sev_fd
    return call


def _command_struct(call: Call, read: Read) -> Fields:
    if call.struct is None or not call.address:
        return {"data": "0x0"}
    try:
        made = call.struct.from_buffer_copy(read(call.address, ctypes.sizeof(call.struct)))
    except Errno:
        return {"data": hex(call.address), **_UNREADABLE}
    return {name: _plain(call.command or "", name, value) for name, value in decode_struct(made).items()}


def _command_result(call: Call, argument: int, result: int, read: Read) -> Fields:
    """What the command changed in its struct, and the firmware's words where it refused."""
    changed = _command_struct(call, read) if call.struct is not None and result != -errno.EFAULT else {}
    if result:
        changed = _given(call.command or "", changed)
    fields = {name: value for name, value in changed.items() if call.fields.get(name) != value}
    try:
        made = _MULTIPLEXED[call.row.number if call.row else 0].from_buffer_copy(read(argument, call.row.size if call.row else 0))
    except Errno:
        return fields
    if result < 0 and made.error:
        fields["firmware"] = firmware_words(made.error)
    return fields


def _sync_sets(bits: int) -> list[str]:
    """Names of the register sets; bits that mean none as one number."""
    unknown = bits & ~sum(_SYNC_NAMES)
    return [name for bit, name in _SYNC_NAMES.items() if bits & bit] + ([hex(unknown)] if unknown else [])


def _plain(name: str, field: str, value: object) -> object:
    """A decoded value as JSON has it."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return _number(name, field, value)
    if isinstance(value, bytes | bytearray):
        return f"<{len(value)} bytes>"
    if isinstance(value, dict):
        return {inner: _plain(name, inner, item) for inner, item in value.items()}
    if isinstance(value, list | tuple):
        return f"<{len(value)} items>" if len(value) > _MOST_ITEMS else [_plain(name, "", item) for item in value]
    return str(value)


def _number(name: str, field: str, value: int) -> object:
    if field == "cap" or (name == "KVM_CHECK_EXTENSION" and field == "arg"):
        return caps.cap_name(value) if value < 1 << 31 else hex(value)
    if name == "KVM_CREATE_VM" and field == "arg":
        return f"{value} {kvm.VM_TYPE_NAMES.get(value, 'unknown')}"
    if field in _COUNTS or field.endswith(("_len", "_fd")) or value < 0 or (field == "arg" and name == "KVM_CREATE_VCPU"):
        return value
    return hex(value)
