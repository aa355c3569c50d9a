"""An error says the ioctl, its argument, the errno and the firmware status in words, and what to do."""

from __future__ import annotations

import errno
import pickle

import pytest

from kvmapi import errors, words
from kvmapi.abi import psp, sev, structs
from kvmapi.table import named, table_names


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
        " the wrong state). Hint: read KVM_SEV_GUEST_STATUS and follow START, UPDATE, MEASURE, FINISH"
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


@pytest.mark.parametrize("code", sorted(psp.RET_NAMES))
def test_every_firmware_status_has_words(code: int) -> None:
    text, _remedy = words.FIRMWARE[code]
    assert text and psp.ret_name(code) in errors.firmware_words(code)


def test_an_unknown_firmware_status_is_said_so() -> None:
    assert "status 0x1e" in errors.firmware_words(0x1E)
    assert set(words.FIRMWARE) == set(psp.RET_NAMES)


def test_hints_name_things_that_exist() -> None:
    known = table_names() | {"mmap", "fallocate"}
    assert {name for name, _ in words.HINTS} <= known


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
