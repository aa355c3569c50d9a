"""Numbers and layouts against the C headers of the machine, and against a table for what those are too old to know.

1. Generate one small C file per question (a constant, a struct, a struct's member), from our own Python names.
2. A header that lacks the name must not break the others: constants are asked with #ifdef, enum constants and
   structs only if the preprocessed headers contain the word.
3. Compile and run it once; compare every answer.
4. Compare every KVM request that the header defines with ours, so that none is missing.
5. What Linux 6.1's headers lack is in the table below, taken from a compilation of Linux 7.3's headers.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kvmapi.abi import caps, cert, encoding, ioctls, irq, kvm, psp, run, sev, structs, vcpu, xen

HEADERS = ["linux/kvm.h", "asm/kvm.h", "linux/psp-sev.h", "linux/kvm_para.h"]
INCLUDES = "#include <stdio.h>\n#include <stddef.h>\n#include <errno.h>\n" + "".join(f"#include <{h}>\n" for h in HEADERS)

# Names of ours that are not the header's.
OUR_OWN = {
    "KVM_USER_MEM_SLOTS",
    "SEV_STATUS_FLAGS_OWNED",
}
ANSWERS = re.compile(r"^(\S+) (-?\d+)$", re.M)

OTHER_ARCHITECTURES = re.compile(r"S390|PPC|ARM|SPAPR|_RMA|DIRTY_TLB|RISCV|LOONG|XICS|MIPS")


def _constants(module: ModuleType) -> dict[str, int]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, int) and re.match(r"(KVM|SEV|SNP|GUEST_MEMFD|MSR_KVM)_", name) and name not in OUR_OWN
    }


def _structs(module: ModuleType) -> dict[str, type[ctypes.Structure]]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, ctypes.Structure) and not name.startswith("_")
    }


def _members(struct: Any, prefix: str = "") -> dict[str, int]:
    """Offsets of a struct's fields under the header's names; anonymous unions are seen through."""
    found = {}
    for field in struct._fields_:
        name = field[0]
        descriptor = getattr(struct, name)
        if len(field) == 3:  # a bit field has no offset in C
            continue
        if name in getattr(struct, "_anonymous_", ()):
            inner = field[1]
            found.update({n: descriptor.offset + o for n, o in _members(inner).items()})
        else:
            found[prefix + name] = descriptor.offset
    return found


@cache
def _preprocessed() -> str:
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("gcc is missing; install it (apt-get install gcc) to compare with the C headers")
    done = subprocess.run([gcc, "-E", "-dD", "-"], input=INCLUDES, text=True, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"KVM's headers are missing; install linux-libc-dev. gcc said: {done.stderr[:200]}")
    return done.stdout


@cache
def _words() -> frozenset[str]:
    return frozenset(re.findall(r"\w+", _preprocessed()))


def _ask(expressions: dict[str, str], tmp: Path) -> dict[str, int]:
    """Print the value of C expressions, each under a key."""
    lines = [f'printf("{key} %lld\\n", (long long)({text}));' for key, text in expressions.items()]
    source = INCLUDES + "int main(void) {\n" + "\n".join(lines) + "\nreturn 0; }\n"
    (tmp / "probe.c").write_text(source)
    subprocess.run(["gcc", "-w", "-o", tmp / "probe", tmp / "probe.c"], check=True, capture_output=True)
    out = subprocess.run([tmp / "probe"], check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in ANSWERS.findall(out)}


@pytest.mark.parametrize("module", [ioctls, caps, kvm, sev, psp], ids=lambda m: m.__name__)
def test_constants_agree_with_the_headers(module: ModuleType, tmp_path: Path) -> None:
    known = {name: value for name, value in _constants(module).items() if name in _words()}
    assert len(known) > 20
    answers = _ask({name: f"(unsigned long long)({name})" for name in known}, tmp_path)
    differ = {name: (hex(value), hex(answers[name])) for name, value in known.items() if value & 0xFFFF_FFFF != answers[name] & 0xFFFF_FFFF}
    assert not differ


@pytest.mark.parametrize("module", [structs, irq, xen, vcpu, sev, psp], ids=lambda m: m.__name__)
def test_structs_agree_with_the_headers(module: ModuleType, tmp_path: Path) -> None:
    text = _preprocessed()
    questions: dict[str, str] = {}
    expected: dict[str, int] = {}
    for name, struct in _structs(module).items():
        body = re.search(rf"struct {name} \{{(.*?)\n\}}", text, re.S)
        if body is None:
            continue
        expected[name] = ctypes.sizeof(struct)
        questions[name] = f"sizeof(struct {name})"
        in_header = set(re.findall(r"\w+", body.group(1)))
        for member, offset in _members(struct).items():
            if member in in_header:
                expected[f"{name}.{member}"] = offset
                questions[f"{name}.{member}"] = f"offsetof(struct {name}, {member})"
    assert questions
    assert _ask(questions, tmp_path) == expected


def test_kvm_run_agrees_with_the_header(tmp_path: Path) -> None:
    body = re.search(r"struct kvm_run \{(.*?)\n\};", _preprocessed(), re.S)
    assert body is not None
    in_header = set(re.findall(r"\w+", body.group(1)))
    expected = {"": ctypes.sizeof(run.kvm_run)}
    questions = {"": "sizeof(struct kvm_run)"}
    for member, offset in _members(run.kvm_run).items():
        if member not in in_header:
            continue
        expected[member], questions[member] = offset, f"offsetof(struct kvm_run, {member})"
        kind = {f[0]: f[1] for f in run.kvm_run_exit._fields_}.get(member)
        if kind is None or not hasattr(kind, "_fields_"):
            continue
        for inner, inner_offset in _members(kind).items():
            if inner in in_header or inner in _words():
                key = f"{member}.{inner}"
                expected[key], questions[key] = offset + inner_offset, f"offsetof(struct kvm_run, {key})"
    # Members that Linux 6.1 spells without the newer union.
    if "KVM_EXIT_HYPERCALL_LONG_MODE" not in _words():
        questions.pop("hypercall.flags"), expected.pop("hypercall.flags")
    keys = {f"q{i}": key for i, key in enumerate(questions)}
    answers = _ask({q: questions[key] for q, key in keys.items()}, tmp_path)
    assert {keys[q]: value for q, value in answers.items()} == expected


def test_no_request_of_the_header_is_missing() -> None:
    defined = set(re.findall(r"^#define (KVM_\w+)\s+(?:_IO|_IOR|_IOW|_IOWR|__KVM_DEPRECATED)\w*\b", _preprocessed(), re.M))
    missing = {name for name in defined if not hasattr(ioctls, name) and not OTHER_ARCHITECTURES.search(name)}
    assert not missing
    assert len(defined) > 90


def test_no_capability_or_exit_of_the_header_is_missing() -> None:
    text = _preprocessed()
    assert not {n for n in re.findall(r"^#define (KVM_CAP_\w+) ", text, re.M) if not hasattr(caps, n)}
    exits = re.findall(r"^#define (KVM_EXIT_[A-Z0-9_]+)\s+\d+$", text, re.M)
    assert not {n for n in exits if not hasattr(kvm, n)}


# --- newer than Linux 6.1 ------------------------------------------------------------------------------------------

NEWER_NUMBERS = {
    "KVM_SET_USER_MEMORY_REGION2": 0x40A0AE49,
    "KVM_SET_MEMORY_ATTRIBUTES": 0x4020AED2,
    "KVM_CREATE_GUEST_MEMFD": 0xC040AED4,
    "KVM_PRE_FAULT_MEMORY": 0xC040AED5,
    # and what every kernel has
    "KVM_CREATE_VM": 0xAE01,
    "KVM_CHECK_EXTENSION": 0xAE03,
    "KVM_GET_VCPU_MMAP_SIZE": 0xAE04,
    "KVM_GET_SUPPORTED_CPUID": 0xC008AE05,
    "KVM_HAS_DEVICE_ATTR": 0x4018AEE3,
    "KVM_GET_DEVICE_ATTR": 0x4018AEE2,
    "KVM_CREATE_VCPU": 0xAE41,
    "KVM_SET_USER_MEMORY_REGION": 0x4020AE46,
    "KVM_ENABLE_CAP": 0x4068AEA3,
    "KVM_MEMORY_ENCRYPT_OP": 0xC008AEBA,
    "KVM_MEMORY_ENCRYPT_REG_REGION": 0x8010AEBB,
    "KVM_MEMORY_ENCRYPT_UNREG_REGION": 0x8010AEBC,
    "KVM_X86_SET_MSR_FILTER": 0x4188AEC6,
    "KVM_RUN": 0xAE80,
    "KVM_GET_REGS": 0x8090AE81,
    "KVM_SET_REGS": 0x4090AE82,
    "KVM_GET_SREGS": 0x8138AE83,
    "KVM_SET_SREGS": 0x4138AE84,
    "KVM_SET_CPUID2": 0x4008AE90,
}
NEWER_CAPS = {
    "USER_MEMORY": 3, "X86_USER_SPACE_MSR": 188, "VM_COPY_ENC_CONTEXT_FROM": 197, "EXIT_HYPERCALL": 201,
    "VM_MOVE_ENC_CONTEXT_FROM": 206, "USER_MEMORY2": 231, "MEMORY_FAULT_INFO": 232, "MEMORY_ATTRIBUTES": 233,
    "GUEST_MEMFD": 234, "VM_TYPES": 235, "PRE_FAULT_MEMORY": 236, "GUEST_MEMFD_FLAGS": 244,
}  # fmt: skip
NEWER_SIZES = {
    structs: {"kvm_userspace_memory_region2": 160, "kvm_create_guest_memfd": 64, "kvm_memory_attributes": 32},
    vcpu: {"kvm_pre_fault_memory": 64},
    run: {"kvm_run": 2352},
    sev: {
        "kvm_sev_cmd": 24, "kvm_sev_init": 48, "kvm_sev_launch_start": 40, "kvm_sev_launch_update_data": 16,
        "kvm_sev_launch_secret": 48, "kvm_sev_launch_measure": 16, "kvm_sev_guest_status": 12, "kvm_sev_dbg": 24,
        "kvm_sev_attestation_report": 32, "kvm_sev_send_start": 72, "kvm_sev_send_update_data": 48,
        "kvm_sev_receive_start": 40, "kvm_sev_receive_update_data": 48, "kvm_sev_snp_launch_start": 64,
        "kvm_sev_snp_launch_update": 64, "kvm_sev_snp_launch_finish": 88,
    },
    psp: {
        "sev_issue_cmd": 16, "sev_user_data_status": 12, "sev_user_data_pek_csr": 12,
        "sev_user_data_pek_cert_import": 24, "sev_user_data_pdh_cert_export": 24, "sev_user_data_get_id": 128,
        "sev_user_data_get_id2": 12, "sev_user_data_snp_status": 32, "sev_user_data_snp_config": 64,
        "sev_user_data_snp_vlek_load": 16,
    },
    cert: {
        "sev_ecc_pubkey": 1028, "sev_cert_signature": 520, "sev_cert": 2084, "sev_session": 128,
        "sev_secret_header": 52, "sev_attestation_report": 208, "sev_launch_measurement": 48,
    },
}  # fmt: skip
NEWER_OFFSETS = {
    ("kvm_userspace_memory_region2", "guest_memfd_offset"): 32,
    ("kvm_userspace_memory_region2", "guest_memfd"): 40,
    ("kvm_userspace_memory_region2", "pad2"): 48,
    ("kvm_sev_cmd", "data"): 8,
    ("kvm_sev_cmd", "error"): 16,
    ("kvm_sev_cmd", "sev_fd"): 20,
    ("kvm_sev_init", "flags"): 8,
    ("kvm_sev_init", "ghcb_version"): 12,
    ("sev_issue_cmd", "data"): 4,
    ("sev_issue_cmd", "error"): 12,
    ("sev_user_data_status", "flags"): 3,
    ("sev_user_data_status", "build"): 7,
    ("sev_user_data_status", "guest_count"): 8,
    ("sev_session", "wrap_iv"): 48,
    ("sev_session", "policy_mac"): 96,
    ("sev_secret_header", "mac"): 20,
    ("sev_cert", "pubkey"): 16,
    ("sev_cert", "sig1"): 1044,
    ("sev_cert", "sig2"): 1564,
    ("sev_attestation_report", "sig1"): 64,
}
RUN_OFFSETS = {"memory_fault": 32, "tdx": 32, "snp_req_certs": 32, "exit_reason": 8, "immediate_exit": 1}


def test_newer_requests_and_capabilities() -> None:
    assert {name: getattr(ioctls, name) for name in NEWER_NUMBERS} == NEWER_NUMBERS
    assert {name: getattr(caps, f"KVM_CAP_{name}") for name in NEWER_CAPS} == NEWER_CAPS
    assert psp.SEV_ISSUE_CMD == 0xC0105300


def test_newer_sizes_and_offsets() -> None:
    for module, sizes in NEWER_SIZES.items():
        assert {name: ctypes.sizeof(getattr(module, name)) for name in sizes} == sizes
    every = {name: s for m in (structs, vcpu, sev, psp, cert) for name, s in _structs(m).items()}
    assert {key: getattr(every[key[0]], key[1]).offset for key in NEWER_OFFSETS} == NEWER_OFFSETS
    assert {name: getattr(run.kvm_run, name).offset for name in RUN_OFFSETS} == RUN_OFFSETS
    assert run.kvm_exit_memory_fault.gpa.offset == 8 and run.kvm_exit_hypercall.flags.offset == 64


def test_newer_constants() -> None:
    assert kvm.KVM_EXIT_MEMORY_FAULT == 39 and kvm.KVM_EXIT_TDX == 40 and kvm.KVM_EXIT_SNP_REQ_CERTS == 43
    assert kvm.KVM_MEMORY_EXIT_FLAG_PRIVATE == kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE == 8
    assert [sev.KVM_SEV_INIT2, sev.KVM_SEV_SNP_LAUNCH_START, sev.KVM_SEV_SNP_ENABLE_REQ_CERTS] == [22, 100, 103]
    assert [psp.SEV_RET_INVALID_PAGE_SIZE, psp.SEV_RET_AEAD_OFLOW, psp.SEV_RET_EXIT_RING_BUFFER] == [0x19, 0x1D, 0x1F]
    assert psp.SEV_RET_SHUTDOWN_INCOMPLETE == 0x28 and psp.SEV_RET_INCORRECT_BUFFER_LENGTH == 0x30
    assert (psp.SNP_PLATFORM_STATUS, psp.SNP_VLEK_LOAD) == (9, 12)


def test_a_request_number_comes_apart_again() -> None:
    request = encoding.decode_request(ioctls.KVM_SET_USER_MEMORY_REGION2)
    assert request == (encoding.IOC_WRITE, 160, 0xAE, 0x49)
    assert str(encoding.decode_request(-(1 << 32) | ioctls.KVM_RUN)) == "_IO(0xae, 0x80)"
