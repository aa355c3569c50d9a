"""`--verbose`: for whoever wonders why a program behaves as it does.

Told at once, each thing once: the devices that it opens, the VMs that it makes and their types, capabilities that it asks for
and the model has not, ioctls that the model does not know or have here (ENOTTY, or EINVAL on a vCPU). Told at the end: how many
of each, and how each KVM_RUN ended.

All of it is bounded, whatever the program does: of each subject the first few are told and all are counted, and what a program
chose itself (its name, a path) is shown without control characters.
"""

from __future__ import annotations

import errno
import struct
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvmapi.abi import caps, ioctls, kvm
from kvmapi.abi.sev import KVM_SEV_ES_INIT, KVM_SEV_INIT
from kvmapi.exits import Mapping
from kvmapi.model.caller import Errno
from kvmapi.table import any_row, command, row
from kvmapi.words import EHWPOISON, errno_name
from vmm.exec.record import Memory, comm

MOST_TOLD = 16
"""Lines about one subject; further ones are counted."""

_MOST_KEPT = 1024  # different things of one subject that are told apart
_MOST_REASONS = 64
_LONGEST = 100  # characters of a name that a program chose
_EXIT_REASON, _IMMEDIATE_EXIT = 8, 1  # in kvm_run
_U32 = 0xFFFFFFFF


@dataclass(slots=True)
class Begun:
    """An ioctl between its beginning and its end. `immediate`: KVM_RUN was to return at once."""

    on: str
    file: Any
    request: int
    argument: int
    immediate: bool


class Told:
    """Says what is new and counts the rest. Any thread may call any method."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._lock = threading.Lock()
        self._seen: dict[str, set[object]] = {}
        self._unsaid: Counter[str] = Counter()
        self._opens: Counter[str] = Counter()
        self._types: Counter[int] = Counter()
        self._runs: Counter[str] = Counter()
        self._calls = 0

    def opened(self, tgid: int, path: str, result: int | None) -> None:
        """An open of a name that is the model's, or that the kernel opens (None)."""
        name = _plain(path)
        answer = "this machine's own" if result is None else "" if result >= 0 else errno_name(-result)
        with self._lock:
            if path in ("/dev/kvm", "/dev/sev") and not answer:
                self._opens[path] += 1
        self._tell("opens", (name, tgid, answer), f"{_plain(comm(tgid))} ({tgid}) opens {name}{f': {answer}' if answer else ''}")

    def begin(self, on: str, file: Any, request: int, argument: int, run: Mapping | None) -> Begun:
        """An ioctl begins."""
        immediate = False
        if request == ioctls.KVM_RUN and run is not None:
            try:
                immediate = bool(run[_IMMEDIATE_EXIT])
            except ValueError:  # the vCPU has gone
                pass
        return Begun(on, file, request & _U32, argument, immediate)

    def end(self, begun: Begun, result: int | None, run: Mapping | None, memory: Memory) -> None:
        """It is about to be answered; None: by the kernel."""
        request = begun.request
        if result is None:
            if request == ioctls.KVM_CREATE_VM:
                self._tell("VMs", "kernel's", f"makes VMs of type {_type(begun.argument)} on this machine's own KVM")
            return
        with self._lock:
            self._calls += 1
            if request == ioctls.KVM_RUN and begun.on == "vcpu":
                self._count_run(_reason(run, result, begun.immediate))
        if request == ioctls.KVM_CHECK_EXTENSION and begun.on in ("system", "vm"):
            if not result:
                name = caps.cap_name(begun.argument & _U32)
                self._tell("capabilities", name, f"asked for {name}: the answer is 0, it is not there")
        elif request == ioctls.KVM_CREATE_VM and begun.on == "system":
            self._made_vm(begun.argument, result)
        elif result == -errno.ENOTTY or (result < 0 and _unknown(begun, result)):
            name = _name(begun, memory)
            self._tell("ioctls", (begun.on, name, result), f"{name} on {_where(begun.on)}: {errno_name(-result)}, there is no such call")
        elif request == ioctls.KVM_ENABLE_CAP and result == -errno.EINVAL:
            name = _enabled(begun, memory)
            self._tell("capabilities", (name,), f"KVM_ENABLE_CAP {name} on {_where(begun.on)}: EINVAL")
        elif request == ioctls.KVM_MEMORY_ENCRYPT_OP and not result and (kind := _old_init(begun, memory)):
            self._tell("VMs", kind, f"a VM becomes a {kind} guest (KVM_{kind}_INIT, the way before VM types)")

    def summary(self) -> list[str]:
        """The last lines."""
        with self._lock:
            opens = [f"{path} {_times(count)}" for path, count in sorted(self._opens.items())]
            types = [f"{count} of type {_type(number)}" for number, count in sorted(self._types.items())]
            lines = [f"opened {', '.join(opens) or 'no device'}; {self._calls} ioctls; VMs: {', '.join(types) or 'none'}"]
            if self._runs:
                reasons = ", ".join(f"{reason} {count}" for reason, count in self._runs.most_common())
                lines.append(f"KVM_RUN returned {_times(self._runs.total())}: {reasons}")
            lines += [f"{count} more about {what} were not told" for what, count in sorted(self._unsaid.items())]
        return lines

    # --- inside ------------------------------------------------------------------------------------------------------

    def _tell(self, what: str, key: object, text: str) -> None:
        """One line, unless it was said or there were enough about this subject."""
        with self._lock:
            seen = self._seen.setdefault(what, set())
            if key in seen:
                return
            if len(seen) < _MOST_KEPT:
                seen.add(key)
            if len(seen) > MOST_TOLD:
                self._unsaid[what] += 1
                return
        self._say(text)

    def _made_vm(self, number: int, result: int) -> None:
        name = _type(number)
        if result < 0:
            self._tell("VMs", (number, result), f"KVM_CREATE_VM of type {name}: {errno_name(-result)}")
            return
        with self._lock:
            self._types[number] += 1
            count = self._types.total()
        self._tell("VMs", count, f"makes a VM of type {name}, number {count}")

    def _count_run(self, reason: str) -> None:
        """The lock is held."""
        self._runs[reason if reason in self._runs or len(self._runs) < _MOST_REASONS else "others"] += 1


def _reason(run: Mapping | None, result: int, immediate: bool) -> str:
    """How KVM_RUN ended."""
    if result == -errno.EINTR:
        return "INTR (immediate_exit)" if immediate else "INTR (signal)"
    try:
        reason = struct.unpack_from("<I", run, _EXIT_REASON)[0] if run is not None else -1
    except ValueError:  # the vCPU has gone
        reason = -1
    if result < 0 and not (-result in (errno.EFAULT, EHWPOISON) and reason == kvm.KVM_EXIT_MEMORY_FAULT):
        return errno_name(-result)
    return kvm.exit_name(reason) if reason >= 0 else "unknown"


def _unknown(begun: Begun, result: int) -> bool:
    """Is that the answer to a request which this kind of file does not know?"""
    handlers = getattr(begun.file, "handlers", None)
    return handlers is not None and handlers.get(begun.request) is None and result == -begun.file.unknown_errno()


def _name(begun: Begun, memory: Memory) -> str:
    """Of the ioctl, and of its command if it has commands."""
    found = row(begun.on, begun.request) or any_row(begun.request)
    if found is None:
        return f"ioctl {begun.request:#010x}"
    if begun.request == ioctls.KVM_MEMORY_ENCRYPT_OP and (number := _u32(begun, memory)) is not None:
        inner = command(begun.request, number)
        return f"{found.name} {inner.name if inner else f'command {number}'}"
    return found.name


def _enabled(begun: Begun, memory: Memory) -> str:
    number = _u32(begun, memory)
    return "of unreadable memory" if number is None else caps.cap_name(number)


def _old_init(begun: Begun, memory: Memory) -> str:
    number = _u32(begun, memory)
    return {KVM_SEV_INIT: "SEV", KVM_SEV_ES_INIT: "SEV_ES"}.get(number, "") if number is not None else ""


def _u32(begun: Begun, memory: Memory) -> int | None:
    """The first number that the argument points at."""
    try:
        return int.from_bytes(memory.read(begun.argument, 4), "little")
    except Errno:
        return None


def _type(number: int) -> str:
    return f"{number} ({kvm.VM_TYPE_NAMES[number]})" if number in kvm.VM_TYPE_NAMES else hex(number)


def _where(on: str) -> str:
    return {"system": "/dev/kvm", "sev": "/dev/sev"}.get(on, f"a {on} fd")


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _plain(text: str) -> str:
    shown = "".join(c if c.isprintable() else "?" for c in text[:_LONGEST])
    return shown if len(text) <= _LONGEST else f"{shown}..."
