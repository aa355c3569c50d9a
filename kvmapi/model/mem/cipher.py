"""The memory encryption engine: AES-XTS with a key per VM and the address as the tweak.

Memory is cut in XTS data units of 16 KiB whose number is their address, and each 16-byte block has its own place in its
unit: the same plaintext gives different ciphertext everywhere, and ciphertext moved to another page or another VM decrypts
to garbage. Real parts use an AES mode with a physical-address tweak of their own; what a VMM can observe is the same. The
address is the caller's virtual address, which stands for the system physical address: it stays when a memslot moves.

A unit is four pages because a launch is judged by its speed and the library's call costs more than a page of AES; a
single page pays for the blocks of its unit before it, at most 1.5 µs.

The key rests in the firmware's vault and has no copy: each operation makes its AES context from there and the library
wipes that one when it is done. Plaintext stands in a `Workspace` that whoever asks brings along, in secret memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

if TYPE_CHECKING:
    from kvmapi.model.sev.vault import Vault

UNIT = 16 * 1024
BLOCK = 16
_KEY_SIZE = 32  # XTS with AES-128: two keys of 16 bytes
SLACK = 15
"""Bytes that the library wants behind its output; it does not write there."""
ROOM = UNIT + SLACK

Buffer = bytes | bytearray | memoryview


class Workspace:
    """Room to work on one unit: `hidden` (ROOM bytes of secret memory) for plaintext, `open` for ciphertext. One user at a time."""

    __slots__ = ("hidden", "open")

    def __init__(self, hidden: memoryview) -> None:
        self.hidden = hidden
        self.open = memoryview(bytearray(ROOM))


def _forgotten(*_: object) -> None:
    raise ValueError("this memory encryption key is gone: the guest was decommissioned")


class PageCipher:
    """Encrypts and decrypts memory in multiples of 16 bytes. The key is drawn here and cannot be read back."""

    __slots__ = ("__decrypt", "__encrypt", "__key", "__users", "vault")

    def __init__(self, vault: Vault) -> None:
        self.vault = vault
        self.__users = 1
        self.__key = vault.hold(_KEY_SIZE)
        try:
            self.__key.fill_random()
        except BaseException:
            self.__key.release()
            raise
        algorithm = algorithms.AES(self.__key.view)
        xts = modes.XTS

        # From the start of the unit at `address`: whatever follows belongs to it.
        def encrypt(address: int, data: Buffer, out: Buffer) -> None:
            with vault:
                Cipher(algorithm, xts(address.to_bytes(16, "little"))).encryptor().update_into(data, out)

        def decrypt(address: int, data: Buffer, out: Buffer) -> None:
            with vault:
                Cipher(algorithm, xts(address.to_bytes(16, "little"))).decryptor().update_into(data, out)

        self.__encrypt: Callable[[int, Buffer, Buffer], None] = encrypt
        self.__decrypt: Callable[[int, Buffer, Buffer], None] = decrypt

    def __repr__(self) -> str:
        return "PageCipher(key never shown)"

    def __reduce__(self) -> str:
        raise TypeError("a memory encryption key never leaves the model")

    def shared(self) -> PageCipher:
        """The same key for one more guest: each of them forgets it once."""
        self.__users += 1
        return self

    def forget(self) -> None:
        """The guest is gone, and with the last one so is the key: what it encrypted stays ciphertext for ever."""
        self.__users -= 1
        if not self.__users:
            self.__encrypt = self.__decrypt = _forgotten
            self.__key.release()

    # ---- inside one unit, a page for example, with plaintext in hidden memory only
    def encrypt_part(self, address: int, plain: Buffer, work: Workspace) -> memoryview:
        """`plain` (which may stand in its place in `work.hidden` already) as it stands in memory at `address`; valid until the next use."""
        at = address % UNIT
        end = at + len(plain)
        work.hidden[at:end] = plain
        self.__encrypt(address - at, work.hidden[:end], work.open[: end + SLACK])
        return work.open[at:end]

    def decrypt_part(self, address: int, cipher: Buffer, work: Workspace) -> memoryview:
        """The inverse; the plaintext is a part of `work.hidden`."""
        at = address % UNIT
        end = at + len(cipher)
        work.open[at:end] = cipher
        self.__decrypt(address - at, work.open[:end], work.hidden[: end + SLACK])
        return work.hidden[at:end]

    # ---- any place and size
    def encrypt_into(self, address: int, plain: memoryview, out: memoryview) -> None:
        """Whole units: `address` and length are multiples of UNIT, `out` has SLACK bytes more, which stay."""
        with self.vault:
            for at in range(0, len(plain), UNIT):
                self.__encrypt(address + at, plain[at : at + UNIT], out[at : at + UNIT + SLACK])

    def encrypt(self, address: int, plain: Buffer) -> bytes:
        """`plain` as it stands at `address`; for what its giver has in the clear anyway."""
        return self._by_unit(self.encrypt_part, address, plain)

    def decrypt(self, address: int, cipher: Buffer) -> bytes:
        """The inverse: the answer is plaintext on the heap, as DBG_DECRYPT's is."""
        return self._by_unit(self.decrypt_part, address, cipher)

    @staticmethod
    def _by_unit(function: Callable[[int, Buffer, Workspace], memoryview], address: int, data: Buffer) -> bytes:
        work = Workspace(memoryview(bytearray(ROOM)))
        out, view, done = bytearray(len(data)), memoryview(data), 0
        while done < len(view):
            part = view[done : done + UNIT - address % UNIT]
            out[done : done + len(part)] = function(address, part, work)
            done += len(part)
            address += len(part)
        work.hidden[:] = bytes(ROOM)
        return bytes(out)
