"""Multiboot: what is a header, where segments go, what broken files are told, and what the guest finds, on every host."""

import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vmm import pcguests
from tests.vmm.pcguests import OUT_EAX, by_addresses, elf, header, write
from vmm import boot, multiboot, pc
from vmm.image import MULTIBOOT, ImageError, Segment, load
from vmm.run import GuestRequest, run_guest


def test_a_header_is_aligned_complete_and_has_the_right_sum() -> None:
    assert multiboot.find_header(bytes(8180) + header()) == 8180
    assert multiboot.find_header(bytes(8184) + header()) is None, "beyond the first 8 KiB"
    assert multiboot.find_header(bytes(2) + header()) is None, "not aligned"
    assert multiboot.find_header(header()[:11]) is None
    assert multiboot.find_header(header()[:8] + bytes(4)) is None, "a wrong sum"
    assert multiboot.find_header(header()[:8] + bytes(4) + header()) == 12, "the second one counts"


def test_address_fields_place_the_image(tmp_path: Path) -> None:
    image = load(write(tmp_path, by_addresses(b"code", before=bytes(100), bss=0x5000)))
    assert (image.protocol, image.entry) == (MULTIBOOT, 0x200020)
    (segment,) = image.segments
    assert (segment.gpa, segment.size) == (0x200000, 36 + 0x5000)
    assert segment.data.startswith(header(1 << 16)) and segment.data.endswith(b"code")


def test_without_ends_the_whole_file_is_loaded(tmp_path: Path) -> None:
    image = load(write(tmp_path, header(1 << 16, 0x200000, 0x200000, 0, 0, 0x200020) + b"code"))
    assert [(s.gpa, s.size, len(s.data)) for s in image.segments] == [(0x200000, 36, 36)]


@pytest.mark.parametrize("bits", [1, 2])
def test_an_elf_image_goes_to_its_physical_addresses(tmp_path: Path, bits: int) -> None:
    image = load(write(tmp_path, elf(b"code", bits, gpa=0x400000, vaddr=0xC0400000)))
    assert image.segments == (Segment(0x400000, 0x3000, header() + b"code"),)
    assert image.entry == 0x40000C, "the entry is a virtual address"


def test_low_memory_is_allowed_below_our_own_structures(tmp_path: Path) -> None:
    assert load(write(tmp_path, elf(b"code", gpa=0x8000))).segments[0].gpa == 0x8000
    with pytest.raises(ImageError, match="low memory"):
        load(write(tmp_path, elf(b"code", gpa=pc.AREA_START - 0x1000)))
    with pytest.raises(ImageError, match="low memory"):
        load(write(tmp_path, elf(b"code", gpa=0)))


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (header(4) + bytes(100), "requires what is not offered"),
        (header() + bytes(100), "no address fields"),
        (header(1 << 16), "no room for its address fields"),
        (header(1 << 16, 0x1FF000, 0x200000, 0, 0, 0x200020) + b"code", "not loaded"),
        (header(1 << 16, 0x200010, 0x200000, 0, 0, 0x200020) + b"code", "not loaded"),
        (header(1 << 16, 0x200000, 0x200000, 0x300000, 0, 0x200020) + b"code", "truncated"),
        (header(1 << 16, 0x200000, 0x200000, 0x100000, 0, 0x200020) + b"code", "truncated"),
        (header(1 << 16, 0x200000, 0x200000, 0x200024, 0x200001, 0x200020) + b"code", "corrupt"),
        (header(1 << 16, 0x200000, 0x200000, 0, 0, 0x100) + b"code", "entry point"),
        (header(1 << 16, 0xBFFFFFF0, 0xBFFFFFF0, 0, 0, 0xBFFFFFF0) + b"code", "too big"),
        (elf(b"code")[:95], "not a 64-bit"),  # without its last byte it is no header
        (elf(b"code" * 50)[:-1], "truncated: the segment"),
        (elf(b"code", memory=4), "corrupt"),
        (elf(b"code", entry=0x100), "entry point"),
        (elf(b"code", memory=0xFFFF0000), "too big"),
        (elf(b"code", bits=2, gpa=1 << 63), "too big"),
        (elf(b"code").replace(b"\x02\0\x03\0", b"\x03\0\x03\0", 1), "-static -no-pie"),
        (elf(b"code").replace(b"\x02\0\x03\0", b"\x02\0\x28\0", 1), "machine 40"),
        (elf(b"code").replace(b"ELF\x01", b"ELF\x03", 1), "ELF32 or ELF64"),
    ],
)
def test_broken_files_get_one_sentence_that_names_them(tmp_path: Path, data: bytes, word: str) -> None:
    path = write(tmp_path, data)
    with pytest.raises(ImageError) as caught:
        load(path)
    assert word in str(caught.value)
    assert str(caught.value).startswith(path)
    assert "\n" not in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_files_never_give_anything_but_an_image_or_an_image_error(data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from([elf(b"code"), elf(b"code", 2), by_addresses(b"code", before=bytes(20))]))
    damaged = bytearray(whole)
    at = whole.index(header()[:4])
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(damaged) - 1).filter(lambda place: not at <= place < at + 12))
        damaged[place] = data.draw(st.integers(0, 255))
    try:
        image = multiboot.load("damaged", bytes(damaged[: data.draw(st.integers(at + 12, len(damaged)))]))
    except ImageError:
        return
    assert all(len(s.data) <= s.size and s.end <= boot.LOW_MEMORY_MAX for s in image.segments)
    assert all(s.gpa >= pc.ONE_MIB or s.end <= pc.AREA_START for s in image.segments)
    assert any(s.gpa <= image.entry < s.end for s in image.segments)


def test_the_information_says_the_same_twice() -> None:
    page = multiboot.information(5 << 30)
    flags, lower, upper = struct.unpack_from("<3I", page)
    assert flags & 0x245 == 0x245
    assert (lower, upper) == (639, (3 << 20) - 1024)
    assert struct.unpack_from("<I", page, 16) == (pc.COMMAND_LINE,)
    assert page[struct.unpack_from("<I", page, 64)[0] - pc.INFORMATION :].startswith(b"sevmm\0")
    length, at = struct.unpack_from("<2I", page, 44)
    entries = [struct.unpack_from("<IQQI", page, at - pc.INFORMATION + offset) for offset in range(0, length, 24)]
    assert [entry[1:] for entry in entries] == pc.memory_map(5 << 30)
    assert {entry[0] for entry in entries} == {20}
    assert entries[-1][1:] == (0x100000000, 2 << 30, 1)


def test_the_command_line_begins_with_the_files_name(tmp_path: Path) -> None:
    image = load(write(tmp_path, elf(b"code"), "my guest.elf"))
    assert multiboot.command_line(image, b"a b") == b"my_guest.elf a b"
    assert multiboot.command_line(image, b"") == b"my_guest.elf"


# mov ecx, eax; sub ecx, 0x2badb002 (0 when the magic is right); then what the test adds, and the exit
MAGIC_IN_ECX = b"\x89\xc1\x81\xe9\x02\xb0\xad\x2b"


@pytest.mark.parametrize("form", ["addresses", "elf32", "elf64"])
def test_the_first_state_of_every_form(any_host: Any, tmp_path: Path, form: str) -> None:
    """CR0 without paging, EFLAGS without IF, a stack made by the guest, flat data, the magic, the information's flags."""
    code = MAGIC_IN_ECX + bytes.fromhex(
        "bc00003000"  # mov esp, 0x300000
        "0f20c0" "2501000080" "83f001" "09c1"  # mov eax, cr0; and eax, PG|PE; xor eax, PE; or ecx, eax
        "9c58" "2500020000" "09c1"  # pushfd; pop eax; and eax, IF; or ecx, eax
        "8b03" "f7d0" "2545020000" "09c1"  # mov eax, [ebx]; not eax; and eax, 0x245; or ecx, eax
        "89c8"  # mov eax, ecx
    ) + OUT_EAX  # fmt: skip
    forms = {"addresses": by_addresses(code, bss=0x200000), "elf32": elf(code), "elf64": elf(code, 2)}
    report = run_guest(GuestRequest(write(tmp_path, forms[form]), host=any_host, timeout=20))
    assert (report.result, report.exit_code, report.message) == ("pass", 0, "")


def test_the_value_written_to_the_exit_port_is_the_exit_code(any_host: Any, tmp_path: Path) -> None:
    report = run_guest(GuestRequest(write(tmp_path, elf(b"\xb8\x25\x00\x00\x00" + OUT_EAX)), host=any_host, timeout=20))
    assert (report.result, report.exit_code) == ("fail", 37)


@pytest.mark.gcc
@pytest.mark.parametrize("memory", [16 << 20, 64 << 20, 5 << 30])
def test_the_bundled_guest_believes_what_it_checked(any_host: Any, memory: int) -> None:
    report = run_guest(GuestRequest("multiboot", host=any_host, memory=memory, arguments="some words", timeout=30))
    assert (report.result, report.exit_code, report.message) == ("pass", 0, "")
    lines = report.console.splitlines()
    above = min(memory, 3 << 30) - pc.ONE_MIB
    assert lines[0] == "command line: multiboot.elf some words"
    assert lines[1].startswith(f"memory: {above >> 20} MiB above 1 MiB")
    assert lines[2:] == ["cpus: 1", "64-bit mode reached"]
    code = run_guest(GuestRequest("multiboot", host=any_host, memory=memory, arguments="a exit=9", timeout=30))
    assert (code.result, code.exit_code) == ("fail", 9)


def test_only_type_plain_runs_it(tmp_path: Path) -> None:
    path = write(tmp_path, elf(OUT_EAX))
    for type in ("sev", "sw-protected"):
        report = run_guest(GuestRequest(path, type=type, on="model"))
        assert report.usage
        assert report.message == f"{path} is a Multiboot image, which runs on type plain only, not on {type}"


def test_an_image_beyond_guest_memory_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    path = write(tmp_path, elf(OUT_EAX, memory=100 << 20))
    report = run_guest(GuestRequest(path, on="model"))
    assert report.usage
    assert report.message == f"{path} needs memory up to 0x6600000: ask for --memory 102M or more"
    assert pcguests.MAGIC == multiboot.HEADER_MAGIC
