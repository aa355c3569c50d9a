"""Errors that say which ioctl, with what argument, why, and what to do about it.

    KVM_SET_USER_MEMORY_REGION(slot=1, guest_phys_addr=0x1000, memory_size=0x800, ...): EINVAL (invalid argument).
    Hint: check, in the kernel's order: ...

The words are data (`kvmapi.words`, `words_sev`, `remedies`); this module puts them together. The same facts are attributes, so a caller
never parses a message. Byte buffers appear as their length only: they may hold keys or guest secrets.
"""

from __future__ import annotations

import errno as e
import os

from kvmapi import words, words_sev
from kvmapi.abi import caps, kvm, psp
from kvmapi.abi import sev as sevabi
from kvmapi.remedies import Remedy, open_device
from kvmapi.rows import Argument, Ioctl, decode_argument

_DECIMAL = frozenset({"slot", "id", "nr", "cap", "irq", "gsi", "nmsrs", "nent", "done", "len", "count", "sev_fd", "fd", "guest_memfd"})
_FLAG_NAMES: dict[str, dict[int, str]] = {
    "KVM_SET_USER_MEMORY_REGION": {1: "LOG_DIRTY_PAGES", 2: "READONLY", 4: "GUEST_MEMFD"},
    "KVM_SET_USER_MEMORY_REGION2": {1: "LOG_DIRTY_PAGES", 2: "READONLY", 4: "GUEST_MEMFD"},
    "KVM_CREATE_GUEST_MEMFD": {1: "MMAP", 2: "INIT_SHARED"},
}


class KvmApiError(Exception):
    """Base of the errors that are this package's own and not a system call's."""


class LaunchOrderError(KvmApiError):
    """A launch step was taken on an object whose launch has already gone on."""


class LaunchStateError(KvmApiError):
    """GUEST_STATUS does not say what the launch expects: another state, handle or policy."""


class ExitError(KvmApiError):
    """kvm_run holds values that cannot be: data outside the mapping, or a length that no access has."""


class KvmError(OSError):
    """A system call on KVM or /dev/sev failed.

    Attributes: `ioctl` (its name; for SEV commands the command's name), `errno`, `fw_error` (the firmware's status,
    or None if the firmware was not involved), `arguments` (decoded, without contents of buffers), `hint`.

    >>> KvmError("KVM_CREATE_VM", 22, {"type": 7}, hint="try another").errno
    22
    """

    ioctl: str
    errno: int
    fw_error: int | None
    arguments: dict[str, object]
    hint: str

    def __init__(
        self,
        ioctl: str,
        code: int,
        arguments: dict[str, object] | None = None,
        fw_error: int | None = None,
        hint: str = "",
    ) -> None:
        super().__init__(code, words.errno_words(code))
        self.ioctl = ioctl
        self.fw_error = fw_error
        self.arguments = dict(arguments or {})
        self.hint = hint

    def __reduce__(self) -> tuple[type[KvmError], tuple[object, ...]]:
        return (type(self), (self.ioctl, self.errno, self.arguments, self.fw_error, self.hint))

    def __str__(self) -> str:
        text = f"{self.ioctl}({format_arguments(self.ioctl, self.arguments)}): {words.errno_words(self.errno)}"
        if self.fw_error is not None:
            text += f", {firmware_words(self.fw_error)}"
        return f"{text}. Hint: {self.hint}" if self.hint else text


class HostError(OSError):
    """A device file could not be opened. Attributes: `filename`, `errno`, `hint`."""

    def __init__(self, path: str, code: int, hint: str = "") -> None:
        super().__init__(code, os.strerror(code), path)
        self.hint = hint

    def __reduce__(self) -> tuple[type[HostError], tuple[object, ...]]:
        return (type(self), (self.filename, self.errno, self.hint))

    def __str__(self) -> str:
        text = f"cannot open {self.filename}: {words.errno_words(self.errno or 0)}"
        return f"{text}. Hint: {self.hint}" if self.hint else text


def open_error(path: str, code: int) -> HostError:
    """The `HostError` for a device that did not open, with its remedy."""
    sev = path.endswith("/sev")
    absent = Remedy.SEV_NODE if sev else Remedy.KVM_NODE
    hints: dict[int, str] = {
        e.ENOENT: absent,
        e.EACCES: open_device(path),
        e.EPERM: Remedy.POLICY_OF_DEVICE,
        e.ENXIO: Remedy.CCP if sev else Remedy.KVM_MODULE,
        e.ENODEV: Remedy.CCP if sev else Remedy.KVM_MODULE,
        e.EMFILE: Remedy.FILES,
    }
    return HostError(path, code, hints.get(code, ""))


def firmware_words(code: int) -> str:
    """A firmware status in words.

    >>> firmware_words(2)
    'firmware INVALID_GUEST_STATE (0x2: the guest is in the wrong state)'
    """
    code &= 0xFFFF_FFFF
    text, _ = words_sev.FIRMWARE.get(code, ("a status that this program does not know", ""))
    return f"firmware {psp.ret_name(code)} ({code:#x}: {text})"


def ioctl_error(row: Ioctl, code: int, argument: Argument = None) -> KvmError:
    """The error of a plain ioctl: `row` and what was passed."""
    return KvmError(row.name, code, decode_argument(row, argument), None, words.hint_for((_variant(row, argument), row.name), code))


def _variant(row: Ioctl, argument: Argument) -> str:
    """`KVM_CREATE_VM(2)`, `KVM_ENABLE_CAP(206)`: the name under which `words` has what only this type or capability answers."""
    number = argument if row.name == "KVM_CREATE_VM" else getattr(argument, "cap", None) if row.name == "KVM_ENABLE_CAP" else None
    return row.name if number is None else f"{row.name}({number})"


def command_error(row: Ioctl, command: str, code: int, arguments: dict[str, object], fw_error: int | None) -> KvmError:
    """The error of a command inside KVM_MEMORY_ENCRYPT_OP or SEV_ISSUE_CMD.

    With EIO the firmware's own status explains more than the errno, so its remedy comes first.
    """
    hint = "" if fw_error is None else words_sev.firmware_hint(command, fw_error & 0xFFFF_FFFF)
    return KvmError(command, code, arguments, fw_error, hint or words.hint_for((command, row.name), code))


def call_error(call: str, code: int, arguments: dict[str, object]) -> KvmError:
    """The error of a system call that is not an ioctl (mmap, fallocate), on a KVM fd."""
    return KvmError(call, code, arguments, None, words.hint_for((call,), code))


def _number(ioctl: str, field: str, value: int) -> str:
    if field == "cap" or (ioctl == "KVM_CHECK_EXTENSION" and field == "arg"):
        return caps.cap_name(value)
    if ioctl == "KVM_CREATE_VM" and field == "arg":
        return f"type {value} {kvm.VM_TYPE_NAMES.get(value, 'unknown')}"
    if ioctl.startswith("KVM_SEV_") and field == "state":
        return sevabi.state_name(value)
    if field == "flags" and value and ioctl in _FLAG_NAMES:
        names = [name for bit, name in _FLAG_NAMES[ioctl].items() if value & bit]
        return f"{value:#x} {'|'.join(names)}".rstrip()
    if field in _DECIMAL or field.endswith("_len") or -10 < value < 10:
        return str(value)
    return hex(value)


def _value(ioctl: str, field: str, value: object) -> str:
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int):
        return _number(ioctl, field, value)
    if isinstance(value, list):
        items = [_value(ioctl, "", item) for item in value[:4]]
        return f"[{', '.join(items)}{', ...' if len(value) > 4 else ''}]"
    if isinstance(value, dict):
        return "{" + format_arguments(ioctl, value) + "}"
    return str(value)


def format_arguments(ioctl: str, arguments: dict[str, object]) -> str:
    """Decoded arguments on one line: addresses in hex, capabilities and VM types by name."""
    return ", ".join(f"{field}={_value(ioctl, field, value)}" for field, value in arguments.items())
