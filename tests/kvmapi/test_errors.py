"""An error says the ioctl, its argument, the errno and the firmware status in words, and what to do; so for every SEV command and errno."""

from __future__ import annotations

import errno
import pickle
from typing import Any

import pytest

from kvmapi import errors, words, words_sev
from kvmapi.abi import psp, sev, structs
from kvmapi.remedies import Remedy
from kvmapi.table import named, table_names
from kvmapi.table_sev import GUEST_COMMANDS, PLATFORM_COMMANDS
from tests.kvmapi import sev_errnos


def test_text_of_a_plain_ioctl() -> None:
    argument = structs.kvm_userspace_memory_region(1, 2, 0x10_0000, 0x800, 0x7F00_0000_0000)
    error = errors.ioctl_error(named("KVM_SET_USER_MEMORY_REGION"), errno.EINVAL, argument)
    text = str(error)
    assert text.startswith(
        "KVM_SET_USER_MEMORY_REGION(slot=1, flags=0x2 READONLY, guest_phys_addr=0x100000, memory_size=0x800,"
        " userspace_addr=0x7f0000000000): EINVAL (invalid argument). Hint: "
    )
    assert error.ioctl == "KVM_SET_USER_MEMORY_REGION" and error.errno == errno.EINVAL and error.fw_error is None
    assert error.arguments["memory_size"] == 0x800 and "alignment" in error.hint
    assert isinstance(error, OSError)


def test_text_of_a_firmware_failure() -> None:
    error = errors.command_error(named("KVM_MEMORY_ENCRYPT_OP", "vm"), "KVM_SEV_LAUNCH_MEASURE", errno.EIO, {"len": 48}, 2)
    assert str(error) == (
        "KVM_SEV_LAUNCH_MEASURE(len=48): EIO (input/output error), firmware INVALID_GUEST_STATE (0x2: the guest is in"
        f" the wrong state). Hint: a guest is measured once, before FINISH; remedy: {Remedy.LAUNCH_ORDER}"
    )


def test_a_command_that_the_kernel_refused_has_the_commands_own_hint() -> None:
    row = named("KVM_MEMORY_ENCRYPT_OP", "vm")
    assert "ghcb_version" in errors.command_error(row, "KVM_SEV_INIT2", errno.EINVAL, {}, None).hint
    assert "not an SEV guest" in errors.command_error(row, "KVM_SEV_DBG_DECRYPT", errno.ENOTTY, {}, None).hint


def test_values_that_have_names_are_named() -> None:
    assert "type 2 SEV" in str(errors.ioctl_error(named("KVM_CREATE_VM"), errno.EINVAL, 2))
    assert "KVM_CAP_EXIT_HYPERCALL" in str(errors.ioctl_error(named("KVM_ENABLE_CAP", "vm"), errno.EINVAL, structs.kvm_enable_cap(cap=201)))
    assert "EHWPOISON (memory has a hardware error)" in str(errors.KvmError("KVM_RUN", 133))


def test_buffers_are_never_printed() -> None:
    report = sev.kvm_sev_attestation_report()
    report.mnonce[:] = bytes(range(65, 81))
    error = errors.command_error(
        named("KVM_MEMORY_ENCRYPT_OP", "vm"),
        "KVM_SEV_GET_ATTESTATION_REPORT",
        errno.EIO,
        errors.decode_argument(named("KVM_MEMORY_ENCRYPT_OP", "vm"), report),
        1,
    )
    assert "mnonce=<16 bytes>" in str(error) and "ABCD" not in str(error) and "[65" not in str(error)


NO_REMEDY = {psp.SEV_RET_SUCCESS, psp.SEV_RET_NO_FW_CALL}  # not failures of the firmware


@pytest.mark.parametrize("code", sorted(psp.RET_NAMES))
def test_every_firmware_status_has_words_and_a_remedy(code: int) -> None:
    text, remedy = words_sev.FIRMWARE[code]
    assert text and psp.ret_name(code) in errors.firmware_words(code)
    assert (not remedy) if code in NO_REMEDY else remedy in set(Remedy)


def test_an_unknown_firmware_status_is_said_so() -> None:
    assert "status 0x1e" in errors.firmware_words(0x1E)
    assert set(words_sev.FIRMWARE) == set(psp.RET_NAMES)


def test_a_status_that_says_nothing_leaves_the_hint_to_the_errno() -> None:
    row = named("KVM_MEMORY_ENCRYPT_OP", "vm")
    for status in (psp.SEV_RET_SUCCESS, psp.SEV_RET_NO_FW_CALL, None):
        assert Remedy.DEAD_VM in errors.command_error(row, "KVM_SEV_LAUNCH_FINISH", errno.EIO, {}, status).hint


@pytest.mark.parametrize(
    ("command", "status", "word"),
    [
        ("KVM_SEV_DBG_DECRYPT", psp.SEV_RET_POLICY_FAILURE, "NODBG"),
        ("KVM_SEV_SEND_START", psp.SEV_RET_POLICY_FAILURE, "NOSEND"),
        ("KVM_SEV_LAUNCH_START", psp.SEV_RET_POLICY_FAILURE, "SEV-ES"),
        ("KVM_SEV_LAUNCH_SECRET", psp.SEV_RET_INVALID_GUEST_STATE, "between MEASURE and FINISH"),
    ],
)
def test_a_status_after_a_command_is_told_for_that_command(command: str, status: int, word: str) -> None:
    hint = errors.command_error(named("KVM_MEMORY_ENCRYPT_OP", "vm"), command, errno.EIO, {}, status).hint
    assert word in hint.split("; remedy: ")[0]


def test_the_errnos_cover_the_command_table() -> None:
    assert set(sev_errnos.GUEST) == {command.name for command in GUEST_COMMANDS.values()}
    assert set(sev_errnos.PLATFORM) == {command.name for command in PLATFORM_COMMANDS.values()}


@pytest.mark.parametrize(("command", "code"), sev_errnos.guest_pairs())
def test_every_errno_of_a_guest_command_has_a_hint(command: str, code: int) -> None:
    check_hint(("KVM_MEMORY_ENCRYPT_OP", "vm"), command, code)


@pytest.mark.parametrize(("command", "code"), sev_errnos.platform_pairs())
def test_every_errno_of_a_platform_command_has_a_hint(command: str, code: int) -> None:
    check_hint(("SEV_ISSUE_CMD", "sev"), command, code)


def check_hint(row: tuple[str, Any], command: str, code: int) -> None:
    """A hint of the command's or the ioctl's own, with a remedy of the table where the host must change, and part of the message."""
    hint = words.HINTS.get((command, code)) or words.HINTS[row[0], code]
    assert hint.cause and "unknown" not in words.errno_words(code).lower()
    assert all(isinstance(remedy, Remedy) for remedy in hint.remedies)
    if code in sev_errnos.HOSTS:
        assert hint.remedies
    assert str(errors.command_error(named(*row), command, code, {}, None)).endswith(f"Hint: {hint}")


@pytest.mark.parametrize(("ioctl", "code"), [(name, code) for name, codes in sev_errnos.REGIONS.items() for code in sorted(codes)])
def test_every_errno_of_the_region_ioctls_has_a_hint(ioctl: str, code: int) -> None:
    error = errors.ioctl_error(named(ioctl, "vm"), code, structs.kvm_enc_region(0x1000, 4096))
    assert error.hint
    if code in sev_errnos.HOSTS:
        assert any(remedy in error.hint for remedy in Remedy)


@pytest.mark.parametrize(("cap", "word"), [(197, "mirror"), (206, "VMSA")])
def test_copy_and_move_have_hints_of_their_own(cap: int, word: str) -> None:
    row, argument = named("KVM_ENABLE_CAP", "vm"), structs.kvm_enable_cap(cap=cap)
    assert word in errors.ioctl_error(row, errno.EINVAL, argument).hint
    for code in (errno.EBADF, errno.EBUSY, errno.EINTR, errno.ENOMEM):
        assert words.HINTS[f"KVM_ENABLE_CAP({cap})", code].cause in str(errors.ioctl_error(row, code, argument))
    assert word not in errors.ioctl_error(row, errno.EINVAL, structs.kvm_enable_cap(cap=1)).hint


def test_a_vm_type_that_is_not_offered_has_the_remedy_of_that_type() -> None:
    remedies = {1: Remedy.SW_PROTECTED, 2: Remedy.SEV, 3: Remedy.SEV_ES, 4: Remedy.SNP}
    for type, remedy in remedies.items():
        assert errors.ioctl_error(named("KVM_CREATE_VM"), errno.EINVAL, type).hint.endswith(remedy)


def test_every_remedy_is_used_by_somebody() -> None:
    hinted = {
        remedy for hint in (*words.HINTS.values(), *words.GENERIC_HINTS.values(), *words_sev.AFTER.values()) for remedy in hint.remedies
    }
    devices = {errors.open_error(path, code).hint for path in ("/dev/kvm", "/dev/sev") for code in errno.errorcode}
    doctor = {Remedy.KVM_AMD}  # tests/doctor
    assert hinted | devices | {remedy for _, remedy in words_sev.FIRMWARE.values()} | doctor >= set(Remedy)


def test_hints_name_things_that_exist() -> None:
    known = table_names() | {"mmap", "fallocate"}
    assert {name.partition("(")[0] for name, _ in words.HINTS} <= known
    assert {name for name, _ in words_sev.AFTER} <= known


def test_open_errors_have_remedies() -> None:
    assert "modprobe" in str(errors.open_error("/dev/kvm", errno.ENOENT))
    assert "usermod" in str(errors.open_error("/dev/kvm", errno.EACCES))
    error = errors.open_error("/dev/sev", errno.ENOENT)
    assert error.filename == "/dev/sev" and "ccp" in error.hint


def test_errors_survive_pickling() -> None:
    error = errors.KvmError("KVM_RUN", errno.EINVAL, {"a": 1}, 7, "hint")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and again.fw_error == 7
    host = errors.open_error("/dev/kvm", errno.EACCES)
    assert str(pickle.loads(pickle.dumps(host))) == str(host)
