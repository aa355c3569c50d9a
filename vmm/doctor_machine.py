"""Facts of the machine below KVM: processor, modules, device nodes, limits, tools, Python packages.

Each function asks one thing and gives one `Fact`. Where a device cannot be opened, the remedy names the group that may.
"""

from __future__ import annotations

import grp
import importlib.metadata
import os
import platform
import re
import resource
import stat
import struct

from kvmapi.remedies import Remedy, open_device
from vmm.facts import NO, OK, UNKNOWN, Fact, Surroundings, errno_words

SEV_LEAF = 0x8000001F
"""CPUID leaf "Encrypted Memory Capabilities" (AMD APM volume 3, E.4.17)."""

CAP_IPC_LOCK = 14
PACKAGES = ("unicorn", "pyroaring", "cryptography", "psutil", "pyelftools", "rich", "shtab")


def gather(where: Surroundings) -> list[Fact]:
    """All facts of this file, in the order in which people read them."""
    return [
        kernel(where),
        cpu(where),
        cpu_sev(where),
        kvm_module(where),
        module_parameters(where),
        device(where, "/dev/kvm"),
        device(where, "/dev/sev"),
        memlock(where),
        tool(where, "gcc", "apt install gcc"),
        tool(where, "ld", "apt install binutils"),
        *packages(),
    ]


def kernel(_where: Surroundings) -> Fact:
    """The running kernel; nothing is ever decided by its version."""
    uname = platform.uname()
    return Fact("kernel", "kernel", OK, f"uname: {uname.system} {uname.release} {uname.machine}")


def cpu(where: Surroundings) -> Fact:
    """Vendor and model; SEV exists on AMD only."""
    fields = _cpuinfo(where)
    vendor = fields.get("vendor_id")
    if vendor is None:
        return Fact("cpu", "processor", UNKNOWN, "/proc/cpuinfo has no vendor_id")
    evidence = f"/proc/cpuinfo: {vendor}, {fields.get('model name', 'model unknown')}"
    if platform.machine() != "x86_64":
        return Fact("cpu", "processor", NO, evidence, "an x86-64 machine")
    return Fact("cpu", "processor", OK, evidence)


def cpu_sev(where: Surroundings) -> Fact:
    """CPUID 0x8000001F from /dev/cpu/0/cpuid, else the kernel's flags in /proc/cpuinfo."""
    title = "SEV in the processor"
    remedy = Remedy.SEV
    registers = _cpuid(where, SEV_LEAF)
    if registers is not None:
        eax, ebx, ecx, edx = registers
        words = [name for bit, name in ((0, "SME"), (1, "SEV"), (3, "SEV-ES"), (4, "SEV-SNP")) if eax >> bit & 1]
        evidence = f"CPUID 0x8000001F: eax {eax:#x} ({', '.join(words) or 'nothing'})"
        if "SEV" in words:
            evidence += f", C-bit {ebx & 0x3F}, {ecx} encrypted guests, first ASID of plain SEV {edx}"
            return Fact("cpu-sev", title, OK, evidence)
        return Fact("cpu-sev", title, NO, evidence, remedy)
    flags = _cpuinfo(where).get("flags")
    if flags is None:
        return Fact("cpu-sev", title, UNKNOWN, "neither /dev/cpu/0/cpuid nor the flags in /proc/cpuinfo can be read")
    found = [flag for flag in ("sme", "sev", "sev_es", "sev_snp") if flag in flags.split()]
    evidence = f"/proc/cpuinfo flags: {', '.join(found) or 'no sme, sev, sev_es, sev_snp'}"
    return Fact("cpu-sev", title, OK, evidence) if "sev" in found else Fact("cpu-sev", title, NO, evidence, remedy)


def kvm_module(where: Surroundings) -> Fact:
    """Which vendor module answers behind /dev/kvm, as far as /sys/module tells."""
    title = "KVM module"
    folder = where.path("/sys/module")
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.name.startswith("kvm"))
    except OSError as error:
        return Fact("kvm-module", title, UNKNOWN, f"/sys/module: {error.strerror}")
    vendor = [name for name in names if name != "kvm"]
    if vendor:
        return Fact("kvm-module", title, OK, f"/sys/module: {', '.join(names)}")
    if names:
        return Fact("kvm-module", title, UNKNOWN, "/sys/module: kvm and no vendor module (it may be built in, or not loaded)")
    return Fact("kvm-module", title, NO, "/sys/module: no kvm", Remedy.KVM_MODULE)


def module_parameters(where: Surroundings) -> Fact:
    """sev, sev_es, sev_snp of kvm_amd."""
    title = "SEV in kvm_amd"
    values = {name: where.read(f"/sys/module/kvm_amd/parameters/{name}") for name in ("sev", "sev_es", "sev_snp")}
    if all(value is None for value in values.values()):
        return Fact("kvm-amd", title, NO, "no /sys/module/kvm_amd/parameters/{sev,sev_es,sev_snp}", Remedy.SEV)
    evidence = "/sys/module/kvm_amd/parameters: " + ", ".join(f"{name}={value or 'absent'}" for name, value in values.items())
    if values["sev"] in ("Y", "y", "1"):
        return Fact("kvm-amd", title, OK, evidence)
    return Fact("kvm-amd", title, NO, evidence, Remedy.KVM_AMD)


def device(where: Surroundings, path: str) -> Fact:
    """Whether a device node is there and opens for this user. Opening /dev/kvm or /dev/sev changes nothing."""
    name = path.strip("/").replace("/", "-")
    title = path
    node = where.path(path)
    absent = {"/dev/kvm": Remedy.KVM_NODE, "/dev/sev": Remedy.SEV_NODE}[path]
    try:
        mode = node.stat()
    except OSError as error:
        return Fact(name, title, NO, f"stat {path}: {errno_words(error.errno or 0)}", absent)
    owner = f"mode {stat.filemode(mode.st_mode)}, group {_group(mode.st_gid)}"
    try:
        fd = os.open(node, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        evidence = f"open {path}: {errno_words(error.errno or 0)}; {owner}"
        return Fact(name, title, NO, evidence, _permission_remedy(path, mode, absent, error))
    os.close(fd)
    return Fact(name, title, OK, f"open {path}: works; {owner}")


def memlock(_where: Surroundings) -> Fact:
    """RLIMIT_MEMLOCK: the kernel pins the memory of SEV guests and counts it against this limit (not for CAP_IPC_LOCK)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    words = ["unlimited" if value == resource.RLIM_INFINITY else f"{value // 1024} KiB" for value in (soft, hard)]
    evidence = f"RLIMIT_MEMLOCK: {words[0]} (hard limit {words[1]})"
    if _has_capability(CAP_IPC_LOCK):
        return Fact("memlock", "locked memory", OK, f"{evidence}; does not apply, CAP_IPC_LOCK is held")
    if soft == resource.RLIM_INFINITY or soft >= 64 << 20:
        return Fact("memlock", "locked memory", OK, evidence)
    return Fact("memlock", "locked memory", NO, f"{evidence}: SEV guests on a real host need their size and more", Remedy.MEMLOCK)


def tool(where: Surroundings, name: str, remedy: str) -> Fact:
    """A program that builds the bundled guests."""
    found = where.which(name)
    if found:
        return Fact(name, f"{name} (builds guests)", OK, f"{name} is {found}")
    return Fact(name, f"{name} (builds guests)", NO, f"no {name} on PATH; bundled guests cannot be built", remedy)


def packages() -> list[Fact]:
    """Python packages of the run-time dependencies, by their metadata; none is imported."""
    facts = []
    for package in PACKAGES:
        title = f"Python package {package}"
        try:
            facts.append(Fact(package, title, OK, f"{package} {importlib.metadata.version(package)}"))
        except importlib.metadata.PackageNotFoundError:
            remedy = f"pip install {package}, or start with scripts/sevmm"
            facts.append(Fact(package, title, NO, f"{package} is not installed", remedy))
    return facts


def _cpuinfo(where: Surroundings) -> dict[str, str]:
    """The first processor's block of /proc/cpuinfo."""
    block = (where.read("/proc/cpuinfo") or "").split("\n\n")[0]
    pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _cpuid(where: Surroundings, leaf: int) -> tuple[int, int, int, int] | None:
    """One CPUID leaf through /dev/cpu/0/cpuid (16 bytes at the offset of the leaf); None where that does not work."""
    if "AMD" not in _cpuinfo(where).get("vendor_id", ""):
        return None  # on others the leaf is beyond the highest one, which answers with unrelated numbers
    try:
        with where.path("/dev/cpu/0/cpuid").open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), 16, leaf)
    except OSError:
        return None
    return struct.unpack("<4I", data) if len(data) == 16 else None


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _permission_remedy(path: str, node: os.stat_result, absent: str, error: OSError) -> str:
    if not isinstance(error, PermissionError):
        return absent
    group_may = node.st_mode & 0o060 == 0o060 and node.st_gid != 0
    return open_device(path, _group(node.st_gid), group_may=group_may)


def _has_capability(number: int) -> bool:
    """Whether the effective set of this process holds a capability."""
    try:
        with open("/proc/self/status") as file:
            found = re.search(r"^CapEff:\s*([0-9a-f]+)", file.read(), re.MULTILINE)
    except OSError:
        return False
    return found is not None and bool(int(found[1], 16) >> number & 1)
