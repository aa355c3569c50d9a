"""A job in another OS thread, and back.

ptrace is bound to the thread that seized. A conversion is begun by the thread that answers the call, and has its traced part
done by the tracer; the model's ioctl in its middle belongs to the answering thread again, which may hold locks of the model.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

_TURN = 0.01  # seconds between two times of what is done meanwhile
Here = Callable[[Callable[[], int]], int]  # calls its argument in another thread


def elsewhere(
    job: Callable[[Here], None], post: Callable[[Callable[[], None]], None] | None, meanwhile: Callable[[], None] = lambda: None
) -> None:
    """Do a job in another OS thread, and come back when it is done: in the one that does what is given to `post`, or else
    in one of its own. The job gets a function that calls another one in this thread and brings back its result; while that takes
    long, the other OS thread does `meanwhile` again and again. What the job raises is raised here.
    """
    requests: queue.SimpleQueue[Callable[[], int] | None] = queue.SimpleQueue()
    replies: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()
    failures: list[BaseException] = []

    def here(function: Callable[[], int]) -> int:
        requests.put(function)
        while True:
            try:
                reply = replies.get(timeout=_TURN)
                break
            except queue.Empty:
                meanwhile()
        if isinstance(reply, BaseException):
            raise reply
        return reply

    def whole() -> None:
        try:
            job(here)
        except BaseException as failure:
            failures.append(failure)
        finally:
            requests.put(None)

    if post is not None:
        post(whole)
    else:
        threading.Thread(target=whole, name="conversion", daemon=True).start()
    while (function := requests.get()) is not None:
        try:
            replies.put(function())
        except BaseException as failure:
            replies.put(failure)
    if failures:
        raise failures[0]
