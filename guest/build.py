"""Builds a bundled guest with gcc and ld into a cache folder, and finds it there the next time.

1. The key is a hash of the sources, the linker script and the flags: it needs no compiler.
2. Below the key there is one folder per compiler, named after a hash of path, size and time of gcc and ld as stat gives
   them. A hit with another compiler is no hit; but where there is no compiler at all, any ELF of the key will do.
3. A build happens in a folder of its own and is renamed into place, so that two processes may build at once and nobody
   ever sees half a file. Both write the same bytes: no build id, no time, no path of this machine is in them.
4. A guest may also be a C text that is in no file (`build_text`): the text is put into the cache under its own hash. Tests have
   many of these, so the library's objects are kept for them, and such a build compiles one file.

The cache is $XDG_CACHE_HOME/sevmm/guests, or ~/.cache/sevmm/guests; nothing is written beside the sources, which may lie
in a read-only site-packages. It is never cleaned here: a guest is some 70 KiB, and removing the folder costs a rebuild.
"""

from __future__ import annotations

import errno
import hashlib
import os
import pathlib
import shutil
import subprocess
import tempfile
from typing import NamedTuple

from guest import catalogue

HERE = pathlib.Path(__file__).parent
LIBRARY = HERE / "lib"

# fmt: off
CFLAGS = [
    "-std=gnu11", "-O2", "-g", "-gdwarf-4", "-ffreestanding", "-fno-pic", "-fno-pie", "-mcmodel=small", "-march=x86-64",
    "-mno-red-zone", "-mgeneral-regs-only", "-fno-stack-protector", "-fcf-protection=none", "-fno-omit-frame-pointer",
    "-fno-asynchronous-unwind-tables", "-fno-ident", "-Wall", "-Wextra", "-Werror",
]
LDFLAGS = [
    "-m", "elf_x86_64", "-nostdlib", "-static", "-no-pie", "--build-id=none", "-z", "max-page-size=0x1000",
    "-z", "noexecstack", "--fatal-warnings",
]
TEXT_CFLAGS = [*CFLAGS, "-Wno-unused-parameter"]  # a test's guest_main() rarely needs both
# A Multiboot image begins in 32-bit protected mode and relies on nothing of ours.
CFLAGS_32 = [flag for flag in CFLAGS if flag not in ("-mcmodel=small", "-mno-red-zone")] + ["-m32"]
LDFLAGS_32 = ["elf_i386" if flag == "elf_x86_64" else flag for flag in LDFLAGS]
# fmt: on

# On Debian the prefixed name is the same program; on a host that is not x86 it is the cross compiler.
COMPILERS = ("x86_64-linux-gnu-gcc", "gcc")
LINKERS = ("x86_64-linux-gnu-ld", "ld")


class BuildError(Exception):
    """A guest could not be built. `name` is the guest's; the text is one line, `output` what the tool said."""

    def __init__(self, name: str, message: str, output: str = "") -> None:
        super().__init__(f"guest {name}: {message}")
        self.name = name
        self.output = output


class ToolMissing(BuildError):
    """gcc or ld is not there and no earlier build of these sources is in the cache. `tool` is what is missing."""

    def __init__(self, name: str, tool: str) -> None:
        super().__init__(name, f"{tool} not found, needed to build the bundled guests: apt install gcc binutils")
        self.tool = tool


class Tools(NamedTuple):
    gcc: str | None
    ld: str | None


class Recipe(NamedTuple):
    """What one guest is built from, and how. The build reads `sources` and nothing else, in an order that no file system decides."""

    sources: list[pathlib.Path]
    script: pathlib.Path
    cflags: list[str]
    ldflags: list[str]


def recipe(guest: catalogue.Guest) -> Recipe:
    """How `guest` is built: with the library of our contract, or alone, with the linker script beside its source."""
    if guest.protocol == "multiboot":
        script = guest.source.with_suffix(".ld")
        return Recipe([script, guest.source.with_name(f"{guest.source.stem}_start.S"), guest.source], script, CFLAGS_32, LDFLAGS_32)
    return _with_library(guest.source)


def _with_library(source: pathlib.Path) -> Recipe:
    library = sorted(path for path in LIBRARY.iterdir() if path.suffix in (".c", ".S", ".h", ".ld"))
    return Recipe([*library, source], LIBRARY / "guest.ld", CFLAGS, LDFLAGS)


def build(name: str) -> pathlib.Path:
    """The ELF file of the bundled guest `name`, built now or before.

    Raises KeyError (no such guest), ToolMissing, BuildError.

        >>> build("hello").name
        'hello.elf'
    """
    return _built(name, recipe(catalogue.find(name)))


def build_text(text: str, name: str = "guest") -> pathlib.Path:
    """The ELF file of a guest of our contract whose program is the C text `text`, built now or before.

    The compiler's messages and `__FILE__` call it `NAME.c`. Raises ValueError (a name that is no word), ToolMissing, BuildError.

        >>> build_text('#include "guest.h"\nunsigned guest_main(const struct boot_info *b, unsigned v) { return !b + v; }').name
        'guest.elf'
    """
    if not name.isidentifier():
        raise ValueError(f"{name!r} is no name for a guest: letters, digits and underscores")
    data = f'#line 1 "{name}.c"\n{text}'.encode()
    source = cache_folder() / "text" / hashlib.sha256(data).hexdigest()[:24] / f"{name}.c"
    try:
        if not source.exists():
            _write(source, data)
        return _built(name, _with_library(source)._replace(cflags=TEXT_CFLAGS))
    except OSError as error:
        raise BuildError(name, f"cannot write {source}: {error.strerror or error}") from error


def _write(path: pathlib.Path, data: bytes) -> None:
    """Put a file into the cache as a whole: another process may be at the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".text-", dir=path.parent) as scratch:
        new = pathlib.Path(scratch) / path.name
        new.write_bytes(data)
        os.replace(new, path)


def _library_objects(name: str, gcc: str) -> list[pathlib.Path]:
    """The library's objects in the cache, compiled now or before."""
    sources = sorted(path for path in LIBRARY.iterdir() if path.suffix in (".c", ".S", ".h"))
    folder = cache_folder() / "lib" / _key(Recipe(sources, LIBRARY / "guest.ld", CFLAGS, [])) / _identity(gcc)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".lib-", dir=folder.parent) as scratch:
            objects = pathlib.Path(scratch) / "objects"
            objects.mkdir()
            _compile(name, gcc, CFLAGS, [path for path in sources if path.suffix != ".h"], objects)
            try:
                objects.rename(folder)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # another process was first
                    raise
    return sorted(folder.glob("*.o"))


def _built(name: str, how: Recipe) -> pathlib.Path:
    """The ELF file of `how` in the cache, which may have to be built first."""
    folder = cache_folder() / _key(how)
    tools = Tools(_find(COMPILERS), _find(LINKERS))
    if tools.gcc is None or tools.ld is None:
        earlier = _any_build(folder, name)
        if earlier is not None:
            return earlier
        raise ToolMissing(name, "gcc" if tools.gcc is None else "ld")
    target = folder / _identity(tools.gcc, tools.ld) / f"{name}.elf"
    if not target.exists():
        _build(name, how, tools.gcc, tools.ld, target)
    return target


def _is_text(source: pathlib.Path) -> bool:
    return HERE not in source.parents


def cache_folder() -> pathlib.Path:
    """Where built guests are kept. A relative $XDG_CACHE_HOME is ignored, as the XDG specification asks."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = pathlib.Path(base) if os.path.isabs(base) else pathlib.Path.home() / ".cache"
    return root / "sevmm" / "guests"


def _key(how: Recipe) -> str:
    digest = hashlib.sha256("\0".join([*how.cflags, *how.ldflags]).encode())
    for path in how.sources:
        content = path.read_bytes()
        digest.update(f"\0{path.name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:24]


def _find(names: tuple[str, ...]) -> str | None:
    return next((found for found in map(shutil.which, names) if found), None)


def _identity(*tools: str) -> str:
    """Names a set of tools without running them: a package update changes size or time of the program."""
    digest = hashlib.sha256()
    for tool in tools:
        real = os.path.realpath(tool)
        status = os.stat(real)
        digest.update(f"{real}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]


def _any_build(folder: pathlib.Path, name: str) -> pathlib.Path | None:
    found = sorted(folder.glob(f"*/{name}.elf"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def _build(name: str, how: Recipe, gcc: str, ld: str, target: pathlib.Path) -> None:
    sources = [path for path in how.sources if path.suffix in (".c", ".S")]
    library: list[pathlib.Path] = []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if _is_text(sources[-1]):
            sources, library = sources[-1:], _library_objects(name, gcc)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as scratch:
            _compile(name, gcc, how.cflags, sources, pathlib.Path(scratch))
            objects = [*map(str, library), *(f"{path.stem}.o" for path in sources)]
            _call(name, [ld, *how.ldflags, "-T", str(how.script), "-o", "guest.elf", *objects], scratch)
            os.replace(os.path.join(scratch, "guest.elf"), target)
    except OSError as error:
        raise BuildError(name, f"cannot build in {target.parent}: {error.strerror or error}") from error


def _compile(name: str, gcc: str, cflags: list[str], sources: list[pathlib.Path], folder: pathlib.Path) -> None:
    """Compile `sources` into objects in `folder`."""
    # Debug information names sources relative to the package (a text: by itself), whatever folder it was installed or built in.
    places = {HERE: "guest", folder: ".", **{path.parent: "." for path in sources if _is_text(path)}}
    maps = [f"-ffile-prefix-map={place}={name}" for place, name in places.items()]
    _call(name, [gcc, *cflags, *maps, f"-I{LIBRARY}", "-c", *map(str, sources)], str(folder))


def _call(name: str, command: list[str], folder: str) -> None:
    # The locale decides the language of messages and TMPDIR may be full or absent: neither should matter here.
    environment = {**os.environ, "LC_ALL": "C", "TMPDIR": folder}
    result = subprocess.run(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
        first = next((line for line in lines if "error:" in line.lower()), lines[-1] if lines else "no output")
        tool = os.path.basename(command[0])
        raise BuildError(name, f"{tool} failed ({result.returncode}): {first}", "\n".join(lines))
