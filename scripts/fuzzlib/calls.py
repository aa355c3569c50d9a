"""The call log: a file that the fuzzing process writes through a shared mapping and its parent reads when that process is gone.

Each thread has a ring of the last calls, written before a call is made, so that the one that ended the process is the last. Words are
made of it only when someone wants to read them.
"""

from __future__ import annotations

import errno
import mmap
import struct
from pathlib import Path

from kvmapi.abi.encoding import decode_request
from kvmapi.rows import decode_struct
from kvmapi.table import any_row

KEPT, SIZE = 64, 512
_CALL = struct.Struct("<QqQQqI")  # number, fd, request, argument, result, bytes of data; then the data
_DATA = SIZE - _CALL.size
_OPEN = 1 << 62  # result of a call that did not come back


class Log:
    """The file, and the rings in it."""

    def __init__(self, path: Path, threads: int, *, create: bool = False) -> None:
        size = threads * KEPT * SIZE + threads * 8
        if create:
            path.write_bytes(bytes(size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)
        self.threads = threads
        self._counts = threads * KEPT * SIZE

    def before(self, thread: int, number: int, fd: int, request: int, argument: int, data: bytes) -> None:
        """A call is about to be made."""
        at = (thread * KEPT + number % KEPT) * SIZE
        data = data[:_DATA]
        _CALL.pack_into(self._map, at, number, fd, request & (1 << 64) - 1, argument & (1 << 64) - 1, _OPEN, len(data))
        self._map[at + _CALL.size : at + _CALL.size + len(data)] = data
        struct.pack_into("<Q", self._map, self._counts + 8 * thread, number + 1)

    def after(self, thread: int, number: int, result: int) -> None:
        """It came back."""
        struct.pack_into("<q", self._map, (thread * KEPT + number % KEPT) * SIZE + 32, result)

    def counts(self) -> list[int]:
        """Calls that each thread has begun."""
        return list(struct.unpack_from(f"<{self.threads}Q", self._map, self._counts))

    def last(self, thread: int, how_many: int = 12) -> list[str]:
        """The last calls of a thread, oldest first, in words."""
        count = self.counts()[thread]
        return [self._words(thread, number) for number in range(max(0, count - min(how_many, KEPT)), count)]

    def _words(self, thread: int, number: int) -> str:
        at = (thread * KEPT + number % KEPT) * SIZE
        made, fd, request, argument, result, size = _CALL.unpack_from(self._map, at)
        data = self._map[at + _CALL.size : at + _CALL.size + size]
        row = any_row(request)
        name = str(decode_request(request)) if row is None else row.name
        said = f"{argument:#x}"
        if data and row is not None and row.struct is not None and hasattr(row.struct, "_fields_") and row.size <= len(data):
            said += f" -> {decode_struct(row.struct.from_buffer_copy(data))}"
        elif data:
            said += f" -> {data[:48].hex()}"
        answer = f"-{errno.errorcode.get(-result, -result)}" if result < 0 else str(result)
        if result == _OPEN:
            answer = "did not return"
        return f"thread {thread} call {made}: {name}(fd {fd}, {said}) = {answer}"
