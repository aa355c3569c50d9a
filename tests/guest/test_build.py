"""Building guests: the cache, its key, what is said when a tool is missing, and that builds are reproducible."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from pathlib import Path

import pytest
from boot_image import symbol
from elftools.elf.elffile import ELFFile

from guest import build, catalogue
from tests.conftest import PATIENCE

NAMES = [guest.name for guest in catalogue.GUESTS]
OUR_CONTRACT = [guest.name for guest in catalogue.GUESTS if guest.protocol == "sevmm"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_tools(tmp_path: Path) -> str:
    """A PATH with nothing on it."""
    folder = tmp_path / "empty"
    folder.mkdir()
    return str(folder)


@pytest.mark.gcc
def test_the_multiboot_image_is_32_bit_and_has_its_header_where_loaders_look() -> None:
    path = build.build("multiboot")
    at = path.read_bytes()[:8192].find(bytes.fromhex("02b0ad1b"))
    assert at % 4 == 0 and at > 0
    with path.open("rb") as file:
        image = ELFFile(file)
        assert (image["e_ident"]["EI_CLASS"], image["e_machine"], image["e_type"]) == ("ELFCLASS32", "EM_386", "ET_EXEC")
        first, *_ = image.iter_segments("PT_LOAD")
        assert first["p_paddr"] <= image["e_entry"] < first["p_paddr"] + first["p_memsz"]


@pytest.mark.gcc
@pytest.mark.parametrize("name", OUR_CONTRACT)
def test_image_keeps_the_contract(name: str) -> None:
    with build.build(name).open("rb") as file:
        image = ELFFile(file)
        segments = list(image.iter_segments("PT_LOAD"))
        assert image["e_machine"] == "EM_X86_64" and image["e_type"] == "ET_EXEC"
        assert image["e_entry"] == 0x100000
        assert [segment["p_flags"] for segment in segments] == [5, 4, 6]
        assert all(segment["p_vaddr"] % 4096 == 0 for segment in segments)
        assert segments[-1]["p_vaddr"] + segments[-1]["p_memsz"] <= 0x400000
        stubs = symbol(image, "vector_stubs")
        assert stubs["st_value"] % 16 == 0 and stubs["st_size"] == 32 * 16
        assert symbol(image, "guest_main")
        text = segments[0].data()
    # vector v is pushed by a push imm8 (6a v) after the dummy error code, or first where the CPU pushes the code
    for vector in range(32):
        at = stubs["st_value"] - 0x100000 + 16 * vector
        dummy = b"" if vector in (8, 10, 11, 12, 13, 14, 17, 21, 29, 30) else b"\x6a\x00"
        assert text[at:].startswith(dummy + bytes([0x6A, vector])), vector
        assert text[at + len(dummy) + 2] in (0xE9, 0xEB), f"no jmp after the pushes of vector {vector}"


@pytest.mark.gcc
@pytest.mark.parametrize("name", NAMES)
def test_two_builds_give_the_same_bytes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = []
    for folder in ("one", "another-longer-name"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / folder))
        images.append(build.build(name).read_bytes())
    assert images[0] == images[1]
    assert str(tmp_path).encode() not in images[0]
    assert str(build.HERE).encode() not in images[0], "the sources' folder is in the image"


@pytest.mark.gcc
def test_hit_is_fast_and_leaves_nothing_beside(cache: Path) -> None:
    first = build.build("hello")
    status = first.stat()
    best = min(_timed("hello") for _ in range(20))
    assert best < 0.003 * PATIENCE
    assert first.stat() == status
    assert [path.name for path in cache.rglob("*") if path.is_file()] == ["hello.elf"]


def _timed(name: str) -> float:
    start = time.perf_counter()
    build.build(name)
    return time.perf_counter() - start


@pytest.mark.gcc
def test_without_tools_an_earlier_build_serves(cache: Path, no_tools: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build.build("hello")
    monkeypatch.setenv("PATH", no_tools)
    assert build.build("hello") == built
    with pytest.raises(build.ToolMissing, match=r"^guest spin: gcc not found.*apt install gcc binutils$"):
        build.build("spin")


@pytest.mark.gcc
def test_missing_linker_is_named(cache: Path, no_tools: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (Path(no_tools) / "gcc").symlink_to(shutil.which("gcc") or "/nowhere")
    monkeypatch.setenv("PATH", no_tools)
    with pytest.raises(build.ToolMissing) as caught:
        build.build("hello")
    assert caught.value.tool == "ld"


@pytest.mark.gcc
def test_another_compiler_is_no_hit(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.build("hello")
    real = build._find(build.COMPILERS)
    wrapper = tmp_path / "gcc"
    wrapper.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setattr(build, "COMPILERS", (str(wrapper),))
    second = build.build("hello")
    assert second != first and second.parent.parent == first.parent.parent
    assert second.read_bytes() == first.read_bytes()


@pytest.mark.gcc
def test_compiler_error_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "CFLAGS", [*build.CFLAGS, "-Dguest_halt=1"])
    with pytest.raises(build.BuildError) as caught:
        build.build("hello")
    assert "error:" in str(caught.value) and "\n" not in str(caught.value)
    assert len(caught.value.output.splitlines()) > 1
    assert not [path for path in cache.rglob("*") if path.is_file()], "a failed build left something"


@pytest.mark.gcc
def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(build.BuildError, match=r"cannot build in .*Not a directory"):
        build.build("hello")


@pytest.mark.gcc
def test_builds_at_once(cache: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        paths = pool.map(build.build, ["hello"] * 8)
    assert len(set(paths)) == 1
    assert [path.name for path in cache.rglob("*") if path.is_file()] == ["hello.elf"]


def test_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / ".cache" / "sevmm" / "guests"


def test_no_such_guest() -> None:
    with pytest.raises(KeyError, match="no bundled guest 'nosuch'; there are: hello, exits"):
        build.build("nosuch")


TEXT = '#include "guest.h"\nunsigned guest_main(const struct boot_info *boot, unsigned vcpu) { return boot->vcpus + vcpu; }\n'


@pytest.mark.gcc
def test_a_text_is_built_with_the_library_and_kept(cache: Path) -> None:
    first = build.build_text(TEXT)
    with first.open("rb") as file:
        image = ELFFile(file)
        assert image["e_entry"] == 0x100000 and symbol(image, "guest_main") and symbol(image, "vector_stubs")
    made = first.stat()
    assert build.build_text(TEXT) == first and first.stat() == made
    assert build.build_text(TEXT + "\n") != first
    assert build.build_text(TEXT, "other").name == "other.elf"


@pytest.mark.gcc
def test_a_texts_image_holds_the_same_bytes_wherever_it_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = []
    for folder in ("one", "another-longer-name"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / folder))
        images.append(build.build_text(TEXT).read_bytes())
    assert images[0] == images[1]
    assert str(tmp_path).encode() not in images[0] and str(build.HERE).encode() not in images[0]


@pytest.mark.gcc
def test_a_program_in_a_file_and_the_same_as_a_text_are_the_same_guest(cache: Path) -> None:
    source = (build.HERE / "programs" / "hello.c").read_text()
    loaded = []
    for path in (build.build("hello"), build.build_text(source, "hello")):
        with path.open("rb") as file:
            loaded.append(sorted((s["p_vaddr"], s["p_memsz"]) for s in ELFFile(file).iter_segments("PT_LOAD")))
    assert loaded[0] == loaded[1]


@pytest.mark.gcc
def test_an_error_in_a_text_names_its_line(cache: Path) -> None:
    with pytest.raises(build.BuildError, match=r"guest mine: .*mine.c:2:\d+: error: "):
        build.build_text('#include "guest.h"\nint nonsense = guest_main;\n', "mine")
    with pytest.raises(ValueError, match="no name for a guest"):
        build.build_text(TEXT, "../etc")


@pytest.mark.gcc
def test_another_library_is_no_hit_for_a_text(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.build_text(TEXT)
    changed = tmp_path / "lib"
    shutil.copytree(build.LIBRARY, changed)
    (changed / "console.c").write_text((changed / "console.c").read_text() + "int another_library;\n")
    monkeypatch.setattr(build, "LIBRARY", changed)
    monkeypatch.setattr(build, "HERE", tmp_path)
    second = build.build_text(TEXT)
    assert second != first
    with second.open("rb") as file:
        assert symbol(ELFFile(file), "another_library")


@pytest.mark.gcc
def test_a_text_without_tools_is_served_from_the_cache(cache: Path, no_tools: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build.build_text(TEXT)
    monkeypatch.setenv("PATH", no_tools)
    assert build.build_text(TEXT) == built
    with pytest.raises(build.ToolMissing, match="gcc not found"):
        build.build_text(TEXT + "\n")


@pytest.mark.gcc
def test_texts_built_at_once(cache: Path) -> None:
    texts = [TEXT + "\n" * (n % 3) for n in range(9)]
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert len(set(pool.map(build.build_text, texts))) == 3
    assert len(list((cache / "sevmm" / "guests" / "lib").glob("*/*"))) == 1, "one set of objects, and no scratch folder"
