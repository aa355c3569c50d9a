"""/dev/sev: which check comes first, what is written back, and what each command does to the platform."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from errno import EBUSY, EFAULT, EINVAL, EIO, ENODEV, ENOMEM, EPERM
from typing import Any

import pytest

from kvmapi.abi import psp
from kvmapi.cert_chain import Chain
from kvmapi.errors import KvmError
from kvmapi.sev import SevPlatform
from tests.model.owners import Owner
from tests.model.sev_guest import SevGuest

pytestmark = pytest.mark.model

UNTOUCHED = 0x5A5A5A5A
SIZE = 2084
WRITERS = (psp.SEV_FACTORY_RESET, psp.SEV_PEK_GEN, psp.SEV_PEK_CSR, psp.SEV_PDH_GEN, psp.SEV_PEK_CERT_IMPORT)
BAD = 8
"""An address where nothing is."""


class Device:
    """One open of the model's /dev/sev, below the library."""

    def __init__(self, host: Any, flags: int = os.O_RDWR) -> None:
        self.host = host
        self.fd = host.open("/dev/sev", flags)

    def issue(self, cmd: int, data: ctypes.Structure | ctypes.Array[Any] | int = 0) -> tuple[int, int]:
        """(errno or 0, `error` as it stands afterwards); `error` is UNTOUCHED before."""
        at = data if isinstance(data, int) else ctypes.addressof(data)
        argument = psp.sev_issue_cmd(cmd=cmd, data=at, error=UNTOUCHED)
        result = self.host.ioctl(self.fd, psp.SEV_ISSUE_CMD, ctypes.addressof(argument))
        assert (argument.cmd, argument.data) == (cmd, at)
        return -result, argument.error

    def status(self) -> psp.sev_user_data_status:
        data = psp.sev_user_data_status()
        assert self.issue(psp.SEV_PLATFORM_STATUS, data) == (0, 0)
        return data

    def reset(self) -> None:
        """To UNINIT."""
        assert self.issue(psp.SEV_FACTORY_RESET) == (0, 0)
        assert self.status().state == psp.SEV_PLATFORM_UNINIT


@pytest.fixture
def device(model_host: Any) -> Iterator[Device]:
    opened = Device(model_host)
    yield opened
    model_host.close(opened.fd)


@pytest.fixture
def reader(model_host: Any) -> Iterator[Device]:
    opened = Device(model_host, os.O_RDONLY)
    yield opened
    model_host.close(opened.fd)


def buffer(size: int = 0x5000) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(size)


# --- the ioctl itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cmd", [13, 14, 99, 0xFFFFFFFF])
def test_unknown_commands_are_not_written_back(device: Device, cmd: int) -> None:
    """13 is SEV_MAX itself: the driver lets it through to its switch, which does not know it."""
    assert device.issue(cmd, buffer()) == (EINVAL, UNTOUCHED)


def test_other_ioctls_and_bad_arguments(device: Device) -> None:
    assert device.host.ioctl(device.fd, 0xAE00, 0) == -EINVAL
    for at in (0, BAD, (1 << 64) - 4):
        assert device.host.ioctl(device.fd, psp.SEV_ISSUE_CMD, at) == -EFAULT


def test_a_struct_that_cannot_be_written_back(device: Device) -> None:
    """The command was executed all the same, as the driver would have."""
    pdh = SevPlatform(device.host).pdh_cert_export()[0]
    page = mmap.mmap(-1, mmap.PAGESIZE)
    view = (ctypes.c_char * mmap.PAGESIZE).from_buffer(page)
    page[:16] = bytes(psp.sev_issue_cmd(cmd=psp.SEV_PDH_GEN))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(ctypes.addressof(view)), mmap.PAGESIZE, mmap.PROT_READ) == 0
    assert device.host.ioctl(device.fd, psp.SEV_ISSUE_CMD, ctypes.addressof(view)) == -EFAULT
    assert SevPlatform(device.host).pdh_cert_export()[0] != pdh


@pytest.mark.parametrize("cmd", WRITERS)
def test_changing_commands_need_a_writable_fd(reader: Device, cmd: int) -> None:
    """Before anything else is looked at: the data is nowhere."""
    before = SevPlatform(reader.host).pdh_cert_export()
    assert reader.issue(cmd, BAD) == (EPERM, UNTOUCHED)
    assert SevPlatform(reader.host).pdh_cert_export() == before


@pytest.mark.parametrize(
    "cmd", [psp.SEV_PLATFORM_STATUS, psp.SEV_PEK_CSR, psp.SEV_PDH_CERT_EXPORT, psp.SEV_PEK_CERT_IMPORT, psp.SEV_GET_ID, psp.SEV_GET_ID2]
)
def test_data_that_is_nowhere(device: Device, cmd: int) -> None:
    reached = cmd in (psp.SEV_PLATFORM_STATUS, psp.SEV_GET_ID)  # these only write
    assert device.issue(cmd, BAD) == (EFAULT, 0 if reached else UNTOUCHED)


# --- states ----------------------------------------------------------------------------------------------------------


def test_status(device: Device, reader: Device) -> None:
    for one in (device, reader):
        data = one.status()
        assert (data.api_major, data.api_minor, data.build) == (0, 24, 15)
        assert (data.state, data.guest_count) == (psp.SEV_PLATFORM_INIT, 0)
        assert data.flags == psp.SEV_STATUS_FLAGS_CONFIG_ES
    device.reset()
    assert device.status().flags == 0, "an uninitialised platform is not configured for SEV-ES"


def test_factory_reset_leaves_the_platform_uninitialised(device: Device) -> None:
    platform = SevPlatform(device.host)
    chip, before = platform.get_id(), platform.pdh_cert_export()
    device.reset()
    assert platform.get_id() == chip
    assert platform.pdh_cert_export() != before
    assert device.status().state == psp.SEV_PLATFORM_UNINIT, "the export initialised it for its own time only"
    device.reset()


def test_a_guest_keeps_the_platform(model_host: Any, device: Device) -> None:
    """WORKING: what would take the guest's ground away is refused, a new PDH is not."""
    with SevGuest(model_host):
        assert device.status().state == psp.SEV_PLATFORM_WORKING
        before = SevPlatform(model_host).pdh_cert_export()
        assert device.issue(psp.SEV_FACTORY_RESET) == (EBUSY, 0), "PLATFORM_STATUS, which said so, succeeded"
        assert device.issue(psp.SEV_PEK_GEN) == (EIO, psp.SEV_RET_INVALID_PLATFORM_STATE)
        room = buffer()
        csr = psp.sev_user_data_pek_csr(ctypes.addressof(room), 0x3000)
        assert device.issue(psp.SEV_PEK_CSR, csr) == (EIO, psp.SEV_RET_INVALID_PLATFORM_STATE)
        assert csr.length == 0x3000
        certificate = ctypes.addressof(room)
        owners = psp.sev_user_data_pek_cert_import(certificate, SIZE, certificate, SIZE)
        assert device.issue(psp.SEV_PEK_CERT_IMPORT, owners) == (EIO, psp.SEV_RET_INVALID_PLATFORM_STATE)
        assert SevPlatform(model_host).pdh_cert_export() == before
        assert device.issue(psp.SEV_PDH_GEN) == (0, 0)
        assert SevPlatform(model_host).pdh_cert_export()[1] == before[1]
        assert device.status().guest_count == 1
    assert device.issue(psp.SEV_FACTORY_RESET) == (0, 0)


def test_commands_of_an_uninitialised_platform(device: Device, reader: Device) -> None:
    device.reset()
    query = psp.sev_user_data_pdh_cert_export()
    assert reader.issue(psp.SEV_PDH_CERT_EXPORT, query) == (EPERM, UNTOUCHED), "a reader may not initialise"
    room = buffer()
    at = ctypes.addressof(room)
    assert reader.issue(psp.SEV_PDH_CERT_EXPORT, psp.sev_user_data_pdh_cert_export(at, 0x4001, at, 1)) == (EFAULT, UNTOUCHED)
    assert reader.issue(psp.SEV_GET_ID2, psp.sev_user_data_get_id2()) == (EIO, psp.SEV_RET_INVALID_LEN)
    for cmd, data in (
        (psp.SEV_PEK_GEN, 0),
        (psp.SEV_PDH_GEN, 0),
        (psp.SEV_PEK_CSR, psp.sev_user_data_pek_csr(at, SIZE)),
        (psp.SEV_PDH_CERT_EXPORT, psp.sev_user_data_pdh_cert_export(at, SIZE, at, 3 * SIZE)),
    ):
        assert device.issue(cmd, data) == (0, 0)
        assert device.status().state == psp.SEV_PLATFORM_UNINIT
    bad = psp.sev_user_data_pek_cert_import(at, 1, at, 1)
    assert device.issue(psp.SEV_PEK_CERT_IMPORT, bad) == (EIO, psp.SEV_RET_INVALID_CERTIFICATE)
    assert device.status().state == psp.SEV_PLATFORM_UNINIT, "after a refusal too"


def test_a_guest_starts_on_a_platform_that_was_reset(model_host: Any, device: Device) -> None:
    device.reset()
    with SevGuest(model_host):
        assert device.status().state == psp.SEV_PLATFORM_WORKING
    assert device.status().state == psp.SEV_PLATFORM_INIT


# --- lengths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cmd", "need"), [(psp.SEV_PEK_CSR, SIZE), (psp.SEV_GET_ID2, 64)])
def test_one_buffer(device: Device, cmd: int, need: int) -> None:
    room = buffer()
    at = ctypes.addressof(room)
    for address, length in ((0, 0), (0, 100), (0, 0x4000), (0, 0xFFFFFFFF), (at, 0), (at, need - 1), (at, 1)):
        data = psp.sev_user_data_pek_csr(address, length)
        assert device.issue(cmd, data) == (EIO, psp.SEV_RET_INVALID_LEN)
        assert (data.address, data.length) == (address, need)
    assert not any(room.raw), "nothing is written into a buffer that is too small"
    for length in (need, need + 1, 0x4000):
        data = psp.sev_user_data_pek_csr(at, length)
        assert device.issue(cmd, data) == (0, 0)
        assert data.length == need
        assert any(room.raw[:need]) and not any(room.raw[need:])
    data = psp.sev_user_data_pek_csr(BAD, need)
    assert device.issue(cmd, data) == (EFAULT, 0)
    assert data.length == need


def test_too_long_buffers(device: Device) -> None:
    room = buffer()
    at = ctypes.addressof(room)
    assert device.issue(psp.SEV_PEK_CSR, psp.sev_user_data_pek_csr(at, 0x4001)) == (EFAULT, UNTOUCHED)
    assert device.issue(psp.SEV_GET_ID2, psp.sev_user_data_get_id2(at, 0x4001)) == (0, 0), "only the allocator limits this one"
    assert device.issue(psp.SEV_GET_ID2, psp.sev_user_data_get_id2(at, (4 << 20) + 1)) == (ENOMEM, UNTOUCHED)
    for lengths in ((0x4001, 1), (1, 0x4001)):
        data = psp.sev_user_data_pdh_cert_export(at, lengths[0], at, lengths[1])
        assert device.issue(psp.SEV_PDH_CERT_EXPORT, data) == (EFAULT, UNTOUCHED)
        assert (data.pdh_cert_len, data.cert_chain_len) == lengths


def test_export_of_certificates(device: Device) -> None:
    pdh, chain = buffer(), buffer(0x4000)
    one, two = ctypes.addressof(pdh), ctypes.addressof(chain)
    for arguments in (
        (0, 0x4000, two, 0x4000),
        (one, 0x4000, 0, 0xFFFFFFFF),
        (0, 9, two, 9),
        (one, 0, two, 9),
        (one, 9, 0, 9),
        (one, 9, two, 0),
        (one, 2083, two, 0x4000),
        (one, SIZE, two, 6251),
    ):
        data = psp.sev_user_data_pdh_cert_export(*arguments)
        assert device.issue(psp.SEV_PDH_CERT_EXPORT, data) == (EIO, psp.SEV_RET_INVALID_LEN)
        assert (data.pdh_cert_len, data.cert_chain_len) == (SIZE, 3 * SIZE)
    data = psp.sev_user_data_pdh_cert_export(one, 0x4000, two, 0x4000)
    assert device.issue(psp.SEV_PDH_CERT_EXPORT, data) == (0, 0)
    assert (data.pdh_cert_len, data.cert_chain_len) == (SIZE, 3 * SIZE)
    assert all(link.ok for link in Chain.of(pdh.raw[:SIZE], chain.raw[: 3 * SIZE]).platform_links())
    for arguments in ((BAD, SIZE, two, 3 * SIZE), (one, SIZE, BAD, 3 * SIZE)):
        assert device.issue(psp.SEV_PDH_CERT_EXPORT, psp.sev_user_data_pdh_cert_export(*arguments)) == (EFAULT, 0)


def test_import_looks_at_the_pek_first(device: Device) -> None:
    room = buffer()
    at = ctypes.addressof(room)
    for arguments in (
        (0, SIZE, BAD, SIZE),
        (at, 0, BAD, SIZE),
        (at, 0x4001, BAD, SIZE),
        (at, SIZE, 0, SIZE),
        (at, SIZE, at, 0),
        (at, SIZE, at, 0x4001),
    ):
        data = psp.sev_user_data_pek_cert_import(*arguments)
        assert device.issue(psp.SEV_PEK_CERT_IMPORT, data) == (EINVAL, UNTOUCHED)
    for arguments in ((BAD, SIZE, 0, 0), (at, SIZE, BAD, SIZE)):
        data = psp.sev_user_data_pek_cert_import(*arguments)
        assert device.issue(psp.SEV_PEK_CERT_IMPORT, data) == (EFAULT, UNTOUCHED)


def test_get_id_writes_one_socket(device: Device) -> None:
    data = psp.sev_user_data_get_id()
    data.socket2[:] = b"\xee" * 64
    assert device.issue(psp.SEV_GET_ID, data) == (0, 0)
    assert bytes(data.socket1) == SevPlatform(device.host).get_id()
    assert bytes(data.socket2) == b"\xee" * 64


# --- SNP -------------------------------------------------------------------------------------------------------------


def test_snp_commands_of_a_platform_without_snp(device: Device, reader: Device) -> None:
    room = buffer()
    at = ctypes.addressof(room)
    for one in (device, reader):
        assert one.issue(psp.SNP_PLATFORM_STATUS, 0) == (EINVAL, UNTOUCHED)
        assert one.issue(psp.SNP_PLATFORM_STATUS, at) == (EIO, psp.SEV_RET_INVALID_COMMAND)
        assert one.issue(psp.SNP_COMMIT) == (EIO, psp.SEV_RET_INVALID_COMMAND)
    for cmd in (psp.SNP_SET_CONFIG, psp.SNP_VLEK_LOAD):
        assert reader.issue(cmd, 0) == (EINVAL, UNTOUCHED)
        assert reader.issue(cmd, at) == (EPERM, UNTOUCHED)
        assert device.issue(cmd, BAD) == (ENODEV, UNTOUCHED)


# --- the library -----------------------------------------------------------------------------------------------------


def test_the_librarys_methods(model_host: Any) -> None:
    owner = Owner()
    with SevPlatform(model_host) as platform:
        platform.pek_cert_import(owner.sign(platform.pek_csr()), owner.oca)
        assert platform.status().owned
        with pytest.raises(KvmError) as caught:
            platform.pek_cert_import(owner.sign(platform.pek_csr()), owner.oca)
        assert caught.value.fw_error == psp.SEV_RET_ALREADY_OWNED
        pdh, chain = platform.pdh_cert_export()
        assert chain[SIZE : 2 * SIZE] == owner.oca
        platform.pdh_gen()
        assert platform.pdh_cert_export()[0] != pdh
        platform.pek_gen()
        assert not platform.status().owned
        platform.factory_reset()
        assert len(platform.get_id()) == 64
        for pek, oca in ((b"", b"x"), (b"x", b""), (bytes(0x4001), b"x")):
            with pytest.raises(KvmError) as caught:
                platform.pek_cert_import(pek, oca)
            assert (caught.value.errno, caught.value.fw_error) == (EINVAL, None)


def test_the_library_on_a_readable_device(model_host: Any) -> None:
    """What a user without write access gets: the words of EPERM, and nothing changed."""
    device = SevPlatform(_ReadOnly(model_host))
    before = device.pdh_cert_export()
    for change in (device.factory_reset, device.pek_gen, device.pdh_gen, device.pek_csr):
        with pytest.raises(KvmError) as caught:
            change()
        assert caught.value.errno == EPERM
    assert device.pdh_cert_export() == before


class _ReadOnly:
    """A host whose /dev/sev opens for reading only."""

    def __init__(self, host: Any) -> None:
        self._host = host

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def open(self, path: str, flags: int) -> int:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise PermissionError(13, os.strerror(13), path)
        return int(self._host.open(path, flags))
