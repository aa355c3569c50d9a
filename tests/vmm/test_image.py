"""Guest images: what loads, and what each kind of broken file is told."""

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.image import IMAGE_BASE, ImageError, load

CODE = b"\xb8\x00\x00\x00\x00\xe7\xf4\xf4"


def elf(
    code: bytes = CODE,
    gpa: int = IMAGE_BASE,
    memory: int = 0x3000,
    machine: int = 62,
    kind: int = 2,
    bits: int = 2,
    entry: int | None = None,
) -> bytes:
    """A smallest ELF64: one segment, one symbol `vector_stubs` at its start."""
    symbols = bytes(24) + struct.pack("<IBBHQQ", 1, 0x12, 0, 1, gpa, 16)
    strings = b"\0vector_stubs\0"
    at_symbols = 120 + len(code)
    at_sections = at_symbols + len(symbols) + len(strings)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF" + bytes([bits, 1, 1]), kind, machine, 1, gpa if entry is None else entry,
        64, at_sections, 0, 64, 56, 1, 64, 3, 0,
    )  # fmt: skip
    program = struct.pack("<IIQQQQQQ", 1, 7, 120, gpa, gpa, len(code), memory, 0x1000)
    sections = bytes(64)
    sections += struct.pack("<IIQQQQIIQQ", 0, 2, 0, 0, at_symbols, len(symbols), 2, 1, 8, 24)
    sections += struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, at_symbols + len(symbols), len(strings), 0, 0, 1, 0)
    return header + program + code + symbols + strings + sections


def write(folder: Path, data: bytes, name: str = "guest.elf") -> str:
    path = folder / name
    path.write_bytes(data)
    return str(path)


def test_an_elf_gives_its_segments_entry_and_symbols(tmp_path: Path) -> None:
    image = load(write(tmp_path, elf()))
    assert image.entry == IMAGE_BASE
    assert [(s.gpa, s.size, s.data) for s in image.segments] == [(IMAGE_BASE, 0x3000, CODE)]
    assert image.symbols == {"vector_stubs": IMAGE_BASE}
    assert image.end == IMAGE_BASE + 0x3000


def test_a_flat_image_is_told_by_its_name(tmp_path: Path) -> None:
    image = load(write(tmp_path, CODE, "guest.bin"))
    assert (image.entry, image.segments[0].data, dict(image.symbols)) == (IMAGE_BASE, CODE, {})
    with pytest.raises(ImageError, match=r"no ELF64 executable.* and no flat image called \*\.bin"):
        load(write(tmp_path, CODE, "guest.txt"))


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (elf()[:40], "truncated"),
        (elf()[:100], "truncated: the program header table"),
        (elf()[:125], "truncated: the segment"),
        (elf()[:-1], "truncated: the section header table"),
        (elf(machine=183), "made for AArch64"),
        (elf(machine=4711), "machine 4711"),
        (elf(bits=1), "not a 64-bit"),
        (elf(kind=3), "-static -no-pie"),
        (elf(gpa=0x8000), "overlaps low memory"),
        (elf(memory=4 << 20), "too big"),
        (elf(memory=1 << 63), "too big"),
        (elf(gpa=(1 << 64) - 0x1000, memory=0x2000), "linked too high"),
        (elf(memory=4), "corrupt"),
        (elf(entry=0x5000), "entry point"),
    ],
)
def test_broken_files_get_one_sentence_that_names_them(tmp_path: Path, data: bytes, word: str) -> None:
    path = write(tmp_path, data)
    with pytest.raises(ImageError) as caught:
        load(path)
    text = str(caught.value)
    assert word in text
    assert text.startswith(path)
    assert "\n" not in text


def test_absent_unreadable_and_huge_files(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        load(tmp_path / "none")
    with pytest.raises(ImageError, match="is a directory"):
        load(tmp_path)
    huge = tmp_path / "huge.bin"
    with huge.open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(ImageError, match="64 MiB"):
        load(huge)
    with pytest.raises(ImageError, match="empty"):
        load(write(tmp_path, b"", "empty.bin"))
    with pytest.raises(ImageError, match="too big"):
        load(write(tmp_path, bytes(4 << 20), "big.bin"))


def test_segments_that_share_a_page_are_refused(tmp_path: Path) -> None:
    data = bytearray(elf(memory=0x100))
    data[56:58] = struct.pack("<H", 2)  # two program headers; the second one lies where the code was
    second = struct.pack("<IIQQQQQQ", 1, 7, 0, IMAGE_BASE + 0x200, 0, 8, 8, 0)
    data[120:120] = second
    data[72 : 72 + 0] = b""
    struct.pack_into("<Q", data, 40, 0)
    struct.pack_into("<H", data, 60, 0)
    with pytest.raises(ImageError, match="overlap in a page"):
        load(write(tmp_path, bytes(data)))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_files_never_give_anything_but_an_image_or_an_image_error(data: st.DataObject) -> None:
    import tempfile

    damaged = bytearray(elf())
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(4, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.NamedTemporaryFile(suffix=".elf") as file:
        file.write(damaged[: data.draw(st.integers(0, len(damaged)))])
        file.flush()
        try:
            image = load(file.name)
        except ImageError:
            return
    assert all(s.gpa >= IMAGE_BASE and s.end <= IMAGE_BASE + (3 << 20) and len(s.data) <= s.size for s in image.segments)
