"""The memory encryption engine: AES-XTS with a key per VM and the page's address as the tweak.

Each 4 KiB page is one XTS data unit whose number is its address, so the same plaintext gives different ciphertext on
every page, and ciphertext moved to another page or another VM decrypts to garbage. Real parts use an AES mode with a
physical-address tweak of their own; what a VMM can observe is the same. The address is the caller's virtual address
of the page, which stands for the system physical address: it stays when a memslot moves.
"""

from __future__ import annotations

import os

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

PAGE = 4096


class PageCipher:
    """Encrypts and decrypts whole pages, or 16-byte aligned parts of one. The key is drawn here and cannot be read
    back.
    """

    __slots__ = ("__decrypt", "__decrypt_into", "__encrypt")

    def __init__(self) -> None:
        algorithm = algorithms.AES(os.urandom(32))  # XTS with AES-128: two keys of 16 bytes

        def encrypt(address: int, data: bytes | memoryview) -> bytes:
            return Cipher(algorithm, modes.XTS(address.to_bytes(16, "little"))).encryptor().update(data)

        def decrypt_into(address: int, data: bytes, out: memoryview) -> None:
            Cipher(algorithm, modes.XTS(address.to_bytes(16, "little"))).decryptor().update_into(data, out)

        def decrypt(address: int, data: bytes) -> bytes:
            return Cipher(algorithm, modes.XTS(address.to_bytes(16, "little"))).decryptor().update(data)

        self.__encrypt = encrypt
        self.__decrypt = decrypt
        self.__decrypt_into = decrypt_into

    def __repr__(self) -> str:
        return "PageCipher(key never shown)"

    def __reduce__(self) -> str:
        raise TypeError("a memory encryption key never leaves the model")

    def encrypt_page(self, address: int, plain: bytes | memoryview) -> bytes:
        """One whole page at page-aligned `address`."""
        return self.__encrypt(address, plain)

    def decrypt_page(self, address: int, cipher: bytes) -> bytes:
        """One whole page at page-aligned `address`."""
        return self.__decrypt(address, cipher)

    def decrypt_page_into(self, address: int, cipher: bytes, out: memoryview) -> None:
        """The same, with no copy elsewhere. `out` has 15 bytes more than a page, as the library demands; they stay."""
        self.__decrypt_into(address, cipher, out)

    def encrypt(self, address: int, plain: bytes) -> bytes:
        """`plain` as it stands at `address`: both multiples of 16, any number of pages."""
        return self._by_page(self.__encrypt, address, plain)

    def decrypt(self, address: int, cipher: bytes) -> bytes:
        """The inverse of `encrypt`."""
        return self._by_page(self.__decrypt, address, cipher)

    @staticmethod
    def _by_page(function: object, address: int, data: bytes) -> bytes:
        out = bytearray()
        view = memoryview(data)
        while view:
            inside = address % PAGE
            part = view[: PAGE - inside]
            # Blocks of an XTS unit do not depend on each other, only on their place: a filler in front puts them there.
            whole: bytes = function(address - inside, bytes(inside) + bytes(part))  # type: ignore[operator]
            out += whole[inside:]
            view = view[len(part) :]
            address += len(part)
        return bytes(out)
