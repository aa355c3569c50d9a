"""The guests that need private memory, on the tiny engine: so that they are known to work before a VMM runs them."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from boot_image import PLAIN, SEV, SHARED_PAGE, SW_PROTECTED, TEST_AREA
from tiny_engine import Engine, counts

from guest import build, patterns

pytestmark = pytest.mark.gcc

SIZE = 4096 * patterns.PRIVATE_PAGES


@pytest.mark.parametrize("vm_type", [PLAIN, SW_PROTECTED, SEV])
def test_convert(vm_type: int) -> None:
    result = Engine(vm_type).run(build.build("convert"))
    assert result.code == 0, result.console
    assert result.console.endswith("convert: 512 pages at 0xa00000 ok\nconvert: done\n")
    # three sizes, each to private three times and back twice; two hints for one page each
    assert counts(result.conversions) == {True: 3 * 769, False: 2 * 769 + 2}


def test_fault() -> None:
    result = Engine(SW_PROTECTED, lazy=True).run(build.build("fault"))
    assert result.code == 0, result.console
    assert result.console.endswith("fault: 20 pages touched, nothing lost\n")
    assert sorted(gpa for gpa, _, _ in result.conversions) == [TEST_AREA + 4096 * n for n in range(20)]


@pytest.mark.parametrize("vm_type", [SW_PROTECTED, SEV])
def test_private_memory_stage_by_stage(vm_type: int) -> None:
    seen = {}

    def look(stage: int, engine: Engine) -> None:
        assert int.from_bytes(engine.shared[SHARED_PAGE : SHARED_PAGE + 8], "little") == stage
        seen[stage] = tuple(bytes(m[TEST_AREA : TEST_AREA + SIZE]) for m in (engine.shared, engine.private))

    engine = Engine(vm_type, on_stage=look)
    result = engine.run(build.build("private-memory"))
    assert result.code == 0, result.console
    assert result.console.endswith("private-memory: all bytes verified\n")
    assert ("alias" in result.console) == (vm_type == SEV)

    private, shared = patterns.pattern_private(0, SIZE), patterns.pattern_shared(0, SIZE)
    assert seen[patterns.STAGE_SHARED][0] == shared
    assert seen[patterns.STAGE_PRIVATE] == (shared, private)
    half = seen[patterns.STAGE_HALF_SHARED][0]
    assert half[4096:8192] == patterns.pattern_converted(4096, 4096) and half[:4096] == shared[:4096]
    assert seen[patterns.STAGE_ALL_PRIVATE][1] == private
    assert engine.shared.find(patterns.private_marker()) == -1


@pytest.mark.parametrize("vm_type", [SW_PROTECTED, SEV])
def test_leak_is_found(vm_type: int) -> None:
    engine = Engine(vm_type)
    assert engine.run(build.build("private-memory"), "leak").code == 0
    assert engine.shared.find(patterns.private_marker()) == TEST_AREA + SIZE


class Leaky(Engine):
    """Forgets that conversions change anything: one backing for both."""

    def _fill(self, cpu: object, address: int, access: int, entry: Any, data: object) -> bool:
        known = super()._fill(cpu, address, access, entry, data)
        if known and address >= TEST_AREA:
            entry.paddr %= 1 << 40
        return known


@pytest.mark.parametrize(
    ("name", "vm_type", "text"),
    [
        ("private-memory", SEV, "private page through a shared alias: expected anything but"),
        ("private-memory", SW_PROTECTED, "converted to shared: expected anything but"),
        ("convert", SW_PROTECTED, "first conversion to private: expected 0x0, seen 0x7498702b71979d94 at 0x800000"),
        ("convert", SEV, "first conversion to private: expected anything but"),
    ],
)
def test_guest_notices_one_memory_for_both(name: str, vm_type: int, text: str) -> None:
    result = Leaky(vm_type).run(build.build(name))
    assert result.code == 1
    assert f"check failed: {text}" in result.console


def with_secret(secret: bytes, length: int | None = None, vm_type: int = SEV) -> Engine:
    """An engine whose private secret page holds `secret`, as LAUNCH_SECRET would leave it."""
    engine = Engine(vm_type)
    memory = engine.tables
    memory[0x6000:0x7000] = (b"SEVMMSEC" + (len(secret) if length is None else length).to_bytes(8, "little") + secret).ljust(4096, b"\xa5")
    return engine


@pytest.mark.parametrize("size", [1, 3, 55, 56, 57, 63, 64, 65, 119, 120, 128, 1000, 4080])
def test_secret_is_proved_with_sha256(size: int) -> None:
    """Lengths around the ends of SHA-256's blocks, with and without a nonce in front."""
    secret = bytes((at * 7 + size) & 0xFF for at in range(size))
    for arguments, nonce in (("", b""), ("nonce=abc", b"abc"), (f"x nonce={'n' * 61} y", b"n" * 61)):
        engine = with_secret(secret)
        result = engine.run(build.build("secret"), arguments)
        assert result.code == 0, result.console
        assert result.console.endswith(f" = {hashlib.sha256(nonce + secret).hexdigest()}\n")
        assert engine.private[0x6000:0x7000] == bytes(4096), "wiped when it was used"


@pytest.mark.parametrize(
    ("length", "text"),
    [
        (0, "check failed: a secret of 0 bytes, at most 4080 fit\n"),
        (4081, "check failed: a secret of 4081 bytes"),
        ((1 << 64) - 1, "check failed: a secret of 18446744073709551615 bytes"),
    ],
)
def test_secret_checks_the_length(length: int, text: str) -> None:
    result = with_secret(b"s", length).run(build.build("secret"))
    assert result.code == 1
    assert result.console.startswith(text)


def test_secret_without_one() -> None:
    result = Engine(SEV).run(build.build("secret"))
    assert (result.code, result.console) == (1, "secret: no secret arrived\n")


def test_secret_notices_that_the_host_can_read_it() -> None:
    engine = with_secret(b"open")
    engine.shared[0x6000:0x6008] = b"SEVMMSEC"
    result = engine.run(build.build("secret"))
    assert (result.code, "readable without the C-bit" in result.console) == (1, True)
