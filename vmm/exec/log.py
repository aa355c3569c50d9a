"""Who hears of each call on the model's files: the recording (`--record`) and what is told of it (`--verbose`), either or both.

The supervisor has one Log when somebody wants to hear, and none otherwise, so that the way of a call costs one comparison. A
listener never changes an answer, and what it cannot read stops nothing: a vCPU's page may go while a call on it ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvmapi.model.vcpu import VcpuFile

if TYPE_CHECKING:
    from kvmapi.exits import Mapping
    from vmm.exec.caller import Call
    from vmm.exec.options import ExecOptions
    from vmm.exec.record import CallRecord, Recorder
    from vmm.exec.told import Begun, Told

_KINDS = {"kvm": "system", "kvm-vm": "vm", "kvm-vcpu": "vcpu", "kvm-stats": "stats"}


class Log:
    """Both listeners. `say`: one line on stderr. CannotRecord where the recording cannot be written."""

    def __init__(self, options: ExecOptions, say: Callable[[str], None]) -> None:
        self._recorder: Recorder | None = None
        self._told: Told | None = None
        if options.record is not None:
            from vmm.exec.record import Recorder

            self._recorder = Recorder(options.record, options)
        if options.verbose:
            from vmm.exec.told import Told

            self._told = Told(say)

    def begin(self, call: Call, file: Any, request: int, argument: int) -> Pending:
        """An ioctl begins on `file`, one of the model's, or what stands for it."""
        record = begun = None
        run = _run(file)
        if self._recorder is not None:
            on = kind(file)
            with contextlib.suppress(ValueError):  # its page is gone
                record = self._recorder.ioctl(call.process.tgid, call.thread, on, file, request, argument, call.memory, run)
        if self._told is not None:
            begun = self._told.begin(kind(file), file, request, argument, run)
        return Pending(call, record, begun)

    def end(self, pending: Pending, result: int | None, file: Any) -> None:
        """It is about to be answered with `result`; None: by the kernel."""
        run, made = _run(file), pending.call.made
        if self._recorder is not None and pending.record is not None:
            pending.record.made = self._number(made)
            self._recorder.end(pending.record, result, run)
        if self._told is not None and pending.begun is not None:
            self._told.end(pending.begun, result, run, pending.call.memory)

    def call(self, call: Call, name: str, fields: dict[str, Any], result: int | None, file: Any = None) -> None:
        """Another call, on `file` or on none: its result, None where the kernel goes on with it."""
        if self._recorder is not None:
            from vmm.exec.record import CallRecord

            on, number = self._number(file) or ("", 0)
            made = self._number(call.made)
            self._recorder.call(CallRecord(call.process.tgid, call.thread, name, on, number, fields, result, made))
        if self._told is not None and name == "open":
            self._told.opened(call.process.tgid, fields["path"], result)

    def released(self, file: Any) -> None:
        """The last fd and mapping of a file have gone. Not told of statistics: all that one VM or vCPU gave out are one memfd."""
        if self._recorder is not None and kind(file) != "stats":
            from vmm.exec.record import CallRecord

            on, number = self._number(file) or ("", 0)
            self._recorder.call(CallRecord(0, 0, "release", on, number, result=None))

    def close(self) -> list[str]:
        """All has ended: write what is left. The lines that the user should read."""
        lines = [] if self._told is None else self._told.summary()
        words = self._recorder.close() if self._recorder is not None else ""
        return [*lines, words] if words else lines

    def _number(self, file: Any) -> tuple[str, int] | None:
        if file is None or self._recorder is None:
            return None
        return kind(file), self._recorder.number(file)


class Pending:
    """An ioctl between `begin` and `end`."""

    __slots__ = ("begun", "call", "record")

    def __init__(self, call: Call, record: CallRecord | None, begun: Begun | None) -> None:
        self.call, self.record, self.begun = call, record, begun


def kind(file: Any) -> str:
    """The kind of a file as the ioctl table calls it; the model's own word where that has none."""
    word: str = file.kind
    return _KINDS.get(word, word)


def _run(file: Any) -> Mapping | None:
    return file.page.memory if isinstance(file, VcpuFile) and not file.dead else None
