"""Guest RAM of a traced process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Ram:
    def __init__(self, tgid: int) -> None:
        self.tgid = tgid

    def convertible(self, address: int, size: int) -> bool:
        return False

    def convert(self, held: Any, address: int, size: int, action: Callable[[], int]) -> None: ...
    def pointer(self, address: int, size: int) -> int:
        raise MemoryError

    def accessible(self, address: int, write: bool) -> bool:
        return False

    def pinnable(self, address: int, size: int, write: bool, whole: bool) -> bool:
        return True

    def enter(self) -> None: ...
    def leave(self) -> None: ...
    def discard(self, address: int, size: int) -> bool:
        return False

    def forget(self) -> None: ...
    def close(self) -> None: ...
