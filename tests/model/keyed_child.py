"""The VMM's side of a launch as a process of its own, for test_keys_stay_inside: it gets from its owner what a host gets, and no more.

Lines of hex on stdin and stdout, in this order: PDH out; owner's certificate, session and mask in; measurement out;
secret's header and ciphertext in; "ready" out. Then it waits, with the guest launched and its page used by a vCPU.

The mask is how the test knows the memory key without it being anywhere: the complement of what the firmware "draws".
"""

from __future__ import annotations

import gc
import sys

from kvmapi.exits import Hlt
from kvmapi.launch import Launch
from kvmapi.model.host import ModelHost
from kvmapi.model.sev.vault import Secret
from kvmapi.sev import SevPlatform
from tests.conformance.snippets import MIB, LongGuest
from tests.model.sev_guest import C_MASK, LOAD, SEV

SECRET_AT = 0x100000


def receive() -> bytes:
    return bytes.fromhex(sys.stdin.readline())


def send(data: bytes) -> None:
    print(data.hex(), flush=True)


def draw_masked(mask: bytes) -> None:
    """From now on a memory key is the complement of `mask`, put together in the vault byte by byte."""
    original = Secret.fill_random

    def fill(self: Secret) -> None:
        if self.size != len(mask):
            original(self)
            return
        with self._vault.opened():
            for at, byte in enumerate(mask):
                self.view[at] = byte ^ 0xFF

    Secret.fill_random = fill  # type: ignore[method-assign]


def objects(*roots: object) -> list[bytes]:
    """Every byte string and text that can be reached from `roots`, the interpreter's own modules included."""
    seen: set[int] = set()
    found: list[bytes] = []
    waiting: list[object] = list(roots)
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, bytes | bytearray):
            found.append(bytes(thing))
        elif isinstance(thing, str):
            found.append(thing.encode(errors="replace"))
        waiting += gc.get_referents(thing)
    return found


def main() -> None:
    host = ModelHost()
    guest = LongGuest(host, LOAD, SEV, 2 * MIB, c_mask=C_MASK, vcpus=0)
    platform = SevPlatform(host)
    send(platform.pdh_cert_export()[0])
    certificate, session, mask = receive(), receive(), receive()
    draw_masked(mask)
    launch = Launch(guest.vm, platform).init2()
    guest.start_long(guest.add_vcpu())
    started = launch.start(0, certificate, session)
    started.update_data(guest.hva, MIB)
    measured = started.measure()
    send(measured.measure)
    header, ciphertext = receive(), receive()
    measured.secret(header, ciphertext, guest.hva + SECRET_AT)
    running = measured.finish()
    if guest.again(rbx=SECRET_AT + 8) != Hlt():
        raise SystemExit("the guest did not run")
    guest.again(rbx=0, rax=0)  # and it forgets what it read
    pieces = objects(host, guest, platform, launch, started, measured, running, sys.modules)
    print(len(pieces), flush=True)
    for line in sys.stdin:
        needle = bytes.fromhex(line)
        send(bytes((any(needle in piece for piece in pieces),)))


if __name__ == "__main__":
    main()
