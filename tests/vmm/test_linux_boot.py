"""The Linux/x86 boot protocol: the setup header's checks, boot_params, and both entries on every host."""

import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vmm.pcguests import OUT_EAX, bzimage, write
from vmm import boot, linux_boot, pc
from vmm.image import LINUX32, LINUX64, ImageError, Segment, load
from vmm.run import GuestRequest, run_guest

CODE = b"\x90" * 32


def test_the_kernel_goes_to_1_mib_and_says_how_it_is_entered(tmp_path: Path) -> None:
    short = load(write(tmp_path, bzimage(CODE)))
    assert (short.protocol, short.entry, short.segments) == (LINUX32, 0x100000, (Segment(0x100000, 32, CODE),))
    long = load(write(tmp_path, bzimage(CODE, CODE)))
    assert (long.protocol, long.entry) == (LINUX64, 0x100200)
    old = load(write(tmp_path, bzimage(CODE, CODE, version=0x20B)))
    assert old.protocol == LINUX32, "XLF_KERNEL_64 means nothing before 2.12"


def test_the_room_a_kernel_needs_counts_as_memory(tmp_path: Path) -> None:
    path = write(tmp_path, bzimage(CODE, preferred=0x1000000, room=100 << 20))
    assert load(path).end == 0x1000000 + (100 << 20)
    assert load(write(tmp_path, bzimage(CODE, version=0x209, preferred=0x1000000), "old")).end == 0x100020
    report = run_guest(GuestRequest(path, on="model"))
    assert report.usage
    assert report.message.endswith("needs memory up to 0x7400000: ask for --memory 116M or more")


def test_the_name_does_not_matter(tmp_path: Path) -> None:
    assert load(write(tmp_path, bzimage(CODE), "memtest.bin")).protocol == LINUX32


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (bzimage(CODE, version=0x205), "2.05 is older than 2.06"),
        (bzimage(CODE, loadflags=0), "zImage"),
        (bzimage(CODE)[:1024], "truncated: the kernel has 0 bytes"),
        (bzimage(CODE * 10)[: 1024 + 32], "truncated: the kernel has 32 bytes of 320"),
        (bzimage(CODE)[:0x210], "setup header that ends"),
        (bzimage(CODE).replace(b"\xeb\x66Hdr", b"\xeb\x01Hdr"), "setup header that ends"),
        (bzimage(CODE).replace(b"\xeb\x66Hdr", b"\xeb\xffHdr"), "setup header that ends"),
        (bzimage(CODE, preferred=1 << 40), "too big"),
        (bzimage(CODE, room=0xFFFFFFFF), "too big"),
    ],
)
def test_broken_files_get_one_sentence_that_names_them(tmp_path: Path, data: bytes, word: str) -> None:
    path = write(tmp_path, data)
    with pytest.raises(ImageError) as caught:
        load(path)
    assert word in str(caught.value)
    assert str(caught.value).startswith(path)
    assert "\n" not in str(caught.value)


def test_a_64_bit_entry_needs_a_kernel_that_reaches_it(tmp_path: Path) -> None:
    data = bytearray(bzimage(CODE))
    data[0x236] = 1
    with pytest.raises(ImageError, match="64-bit entry"):
        load(write(tmp_path, bytes(data)))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_files_never_give_anything_but_an_image_or_an_image_error(data: st.DataObject) -> None:
    damaged = bytearray(bzimage(CODE, CODE))
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(0x1F1, 0x270) | st.integers(0, len(damaged) - 1))
        damaged[place] = data.draw(st.integers(0, 255))
    try:
        image = linux_boot.load("damaged", bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))
    except ImageError:
        return
    assert image.end <= boot.LOW_MEMORY_MAX
    assert any(s.gpa <= image.entry < s.end for s in image.segments)
    assert len(linux_boot.boot_params(image, 64 << 20)) == boot.PAGE
    assert 0 <= linux_boot.command_line_limit(image) <= pc.MAX_COMMAND_LINE


def test_boot_params_hold_the_header_as_a_loader_completes_it(tmp_path: Path) -> None:
    image = load(write(tmp_path, bzimage(CODE, CODE)))
    page = linux_boot.boot_params(image, 5 << 30, rsdp=0xF0000)
    assert page[0x202:0x206] == b"HdrS"
    assert page[0x210] == 0xFF, "a loader without a number of its own"
    assert struct.unpack_from("<I", page, 0x214) == (0x100000,)
    assert struct.unpack_from("<2I", page, 0x218) == (0, 0), "no initrd"
    assert struct.unpack_from("<I", page, 0x228) == (pc.COMMAND_LINE,)
    assert struct.unpack_from("<Q", page, 0x70) == (0xF0000,)
    entries = [struct.unpack_from("<QQI", page, 0x2D0 + 20 * number) for number in range(page[0x1E8])]
    assert entries == pc.memory_map(5 << 30)


def test_the_command_line_may_be_as_long_as_the_kernel_says(tmp_path: Path) -> None:
    path = write(tmp_path, bzimage(OUT_EAX))
    report = run_guest(GuestRequest(path, on="model", arguments="x" * 256))
    assert report.usage
    assert report.message == f"{path} takes a command line of at most 255 bytes"


# Both entries: AL = e820_entries of boot_params, plus what the command line begins with ('a' = 0x61).
ENTRY32 = bytes.fromhex("8a86e80100008b9e2802000002030fb6c0") + OUT_EAX
# The same with 64-bit addresses; then a 64-bit immediate, which 32-bit code would take for something else, and CS must be long.
ENTRY64 = bytes.fromhex("8a86e80100008b9e2802000002030fb6c048b9f0debc9a7856341248c1e93081e93412000001c8") + OUT_EAX


@pytest.mark.parametrize(("image", "protocol"), [(bzimage(ENTRY32), LINUX32), (bzimage(b"\xf4" * 16, ENTRY64), LINUX64)])
def test_both_entries_run(any_host: Any, tmp_path: Path, image: bytes, protocol: str) -> None:
    path = write(tmp_path, image)
    assert load(path).protocol == protocol
    report = run_guest(GuestRequest(path, host=any_host, arguments="abc", timeout=20))
    assert (report.exit_code, report.message) == (4 + 0x61, "")


def test_only_type_plain_runs_it(tmp_path: Path) -> None:
    path = write(tmp_path, bzimage(ENTRY32))
    report = run_guest(GuestRequest(path, type="sev", on="model"))
    assert report.usage
    assert report.message == f"{path} is a Linux image, which runs on type plain only, not on sev"
