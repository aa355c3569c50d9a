"""A launch as a chain of types: `Launch` -> `Started` -> `Measured` -> `Running`.

    started = Launch(vm, sev).start(policy, owner.dh_cert, owner.session)
    started.update_data(hva, size)               # as often as there is memory to measure
    started.update_vmsa()                        # SEV-ES, once, when the vCPUs are set up
    measured = started.measure()                 # .measure and .nonce for the owner
    measured.secret(header, ciphertext, hva)     # if the owner has one
    running = measured.finish()

On every step from `Started` on there are also `attestation_report`, `dbg_decrypt` and `dbg_encrypt`.

A step that leads to another state uses its object up: taking a second step from it raises `LaunchOrderError`. After
each of them GUEST_STATUS is read back, and `LaunchStateError` says what differs from what the launch expects. A
step that failed leaves its object usable.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from kvmapi.abi import sev as s
from kvmapi.abi.cert import SEV_ATTESTATION_REPORT_SIZE, SEV_SECRET_HEADER_SIZE
from kvmapi.abi.psp import SEV_RET_INVALID_LEN
from kvmapi.errors import KvmError, LaunchOrderError, LaunchStateError
from kvmapi.sev import SevPlatform
from kvmapi.vm import Vm

NONCE_SIZE = 16


@dataclass(frozen=True, slots=True)
class GuestStatus:
    """KVM_SEV_GUEST_STATUS."""

    handle: int
    policy: int
    state: int

    @property
    def state_name(self) -> str:
        """UNINIT, LAUNCH_UPDATE, LAUNCH_SECRET, RUNNING, ..."""
        return s.state_name(self.state)


def guest_status(vm: Vm) -> GuestStatus:
    """Handle, policy and state of a VM's SEV guest."""
    data = s.kvm_sev_guest_status()
    vm.sev_op(s.KVM_SEV_GUEST_STATUS, data)
    return GuestStatus(data.handle, data.policy, data.state)


class _Step:
    """One object of the chain; `_open` is false once the launch has gone on from here."""

    def __init__(self, vm: Vm, policy: int, handle: int) -> None:
        self.vm = vm
        self.policy = policy
        self.handle = handle
        self._open = True

    def __repr__(self) -> str:
        return f"<{type(self).__name__} handle {self.handle} policy {self.policy:#x}{'' if self._open else ' (past)'}>"

    def _require_open(self, step: str) -> None:
        if not self._open:
            raise LaunchOrderError(
                f"{step}: this launch has gone on from {type(self).__name__}; use the object that the last step returned"
            )

    def _arrived(self, state: int) -> None:
        """Read GUEST_STATUS back, and close this object if the guest is where it should be."""
        status = guest_status(self.vm)
        expected = GuestStatus(self.handle, self.policy, state)
        if status != expected:
            raise LaunchStateError(
                f"expected guest {expected.handle} in {expected.state_name} with policy {expected.policy:#x}, but"
                f" GUEST_STATUS says guest {status.handle} in {status.state_name} with policy {status.policy:#x}"
            )
        self._open = False

    def status(self) -> GuestStatus:
        """KVM_SEV_GUEST_STATUS, now."""
        return guest_status(self.vm)


class Launch(_Step):
    """A launch that has not begun. `vm` is initialised for SEV (INIT2, or INIT on a type-0 VM); see `init2`."""

    def __init__(self, vm: Vm, sev: SevPlatform) -> None:
        super().__init__(vm, 0, 0)
        self.sev = sev

    def init2(self, vmsa_features: int = 0, ghcb_version: int = 0) -> Launch:
        """KVM_SEV_INIT2 on a VM of type SEV or SEV-ES, before it has vCPUs. ghcb_version 0 is the kernel's choice."""
        self._require_open("INIT2")
        self.vm.sev_op(s.KVM_SEV_INIT2, s.kvm_sev_init(vmsa_features=vmsa_features, ghcb_version=ghcb_version))
        return self

    def start(self, policy: int, dh_cert: bytes | None = None, session: bytes | None = None) -> Started:
        """LAUNCH_START. Without the owner's certificate and session nobody can verify the measurement."""
        self._require_open("LAUNCH_START")
        data = s.kvm_sev_launch_start(policy=policy)
        buffers = []  # alive until the call returns
        for blob, name in ((dh_cert, "dh"), (session, "session")):
            if blob is not None:
                buffer = ctypes.create_string_buffer(blob, len(blob))
                buffers.append(buffer)
                setattr(data, f"{name}_uaddr", ctypes.addressof(buffer))
                setattr(data, f"{name}_len", len(blob))
        self.vm.sev_op(s.KVM_SEV_LAUNCH_START, data, self.sev.fd)
        self.policy, self.handle = policy, data.handle
        self._arrived(s.SEV_STATE_LAUNCH_UPDATE)
        return Started(self.vm, policy, data.handle)


class _InFirmware(_Step):
    """A step on which the firmware knows the guest: commands that change neither its state nor the launch."""

    def attestation_report(self, nonce: bytes) -> bytes:
        """GET_ATTESTATION_REPORT: the launch digest with the owner's 16-byte `nonce`, signed by the platform's PEK.

        `kvmapi.attestation` reads and verifies it. Raises ValueError (nonce), KvmError.
        """
        self._require_open("GET_ATTESTATION_REPORT")
        if len(nonce) != NONCE_SIZE:
            raise ValueError(f"the nonce of an attestation report has {NONCE_SIZE} bytes, not {len(nonce)}")
        data = s.kvm_sev_attestation_report()
        data.mnonce[:] = nonce
        try:
            self.vm.sev_op(s.KVM_SEV_GET_ATTESTATION_REPORT, data)
        except KvmError as error:
            if error.fw_error != SEV_RET_INVALID_LEN:
                raise
        if not SEV_ATTESTATION_REPORT_SIZE <= data.len <= s.SEV_FW_BLOB_MAX_SIZE:
            raise LaunchStateError(f"GET_ATTESTATION_REPORT wants {data.len} bytes, where {SEV_ATTESTATION_REPORT_SIZE} are known")
        buffer = ctypes.create_string_buffer(data.len)
        data.uaddr = ctypes.addressof(buffer)
        self.vm.sev_op(s.KVM_SEV_GET_ATTESTATION_REPORT, data)
        return buffer.raw[: data.len]

    def dbg_decrypt(self, hva: int, size: int) -> bytes:
        """DBG_DECRYPT: the plaintext of host virtual [hva, hva+size) of the guest; any alignment.

        Raises KvmError, with the firmware's POLICY_FAILURE for a guest whose policy says NODBG.
        """
        self._require_open("DBG_DECRYPT")
        buffer = ctypes.create_string_buffer(size)
        self.vm.sev_op(s.KVM_SEV_DBG_DECRYPT, s.kvm_sev_dbg(src_uaddr=hva, dst_uaddr=ctypes.addressof(buffer), len=size))
        return buffer.raw

    def dbg_encrypt(self, hva: int, data: bytes) -> None:
        """DBG_ENCRYPT: write `data` into the guest's private memory at host virtual `hva`; any alignment. Errors as `dbg_decrypt`."""
        self._require_open("DBG_ENCRYPT")
        buffer = ctypes.create_string_buffer(data, len(data))
        self.vm.sev_op(s.KVM_SEV_DBG_ENCRYPT, s.kvm_sev_dbg(src_uaddr=ctypes.addressof(buffer), dst_uaddr=hva, len=len(data)))


class Started(_InFirmware):
    """Memory and registers are being measured and encrypted (LAUNCH_UPDATE)."""

    def update_data(self, hva: int, size: int) -> None:
        """Encrypt host virtual [hva, hva+size) in place and add it to the digest; multiples of 16 bytes."""
        self._require_open("LAUNCH_UPDATE_DATA")
        self.vm.sev_op(s.KVM_SEV_LAUNCH_UPDATE_DATA, s.kvm_sev_launch_update_data(uaddr=hva, len=size))

    def update_vmsa(self) -> None:
        """Encrypt all vCPUs' registers and add them to the digest (SEV-ES); no register ioctls afterwards."""
        self._require_open("LAUNCH_UPDATE_VMSA")
        self.vm.sev_op(s.KVM_SEV_LAUNCH_UPDATE_VMSA)

    def measure(self) -> Measured:
        """Close the digest. The length is asked for first, as the firmware decides it."""
        self._require_open("LAUNCH_MEASURE")
        query = s.kvm_sev_launch_measure()
        try:
            self.vm.sev_op(s.KVM_SEV_LAUNCH_MEASURE, query)
        except KvmError as error:
            if error.fw_error != SEV_RET_INVALID_LEN:
                raise
        if not s.MEASURE_SIZE <= query.len <= s.SEV_FW_BLOB_MAX_SIZE:
            raise LaunchStateError(f"LAUNCH_MEASURE wants {query.len} bytes, where {s.MEASURE_SIZE} are known")
        buffer = ctypes.create_string_buffer(query.len)
        self.vm.sev_op(s.KVM_SEV_LAUNCH_MEASURE, s.kvm_sev_launch_measure(uaddr=ctypes.addressof(buffer), len=query.len))
        self._arrived(s.SEV_STATE_LAUNCH_SECRET)
        return Measured(self.vm, self.policy, self.handle, buffer.raw[:32], buffer.raw[32 : s.MEASURE_SIZE])


class Measured(_InFirmware):
    """Measured; secrets may be put in (LAUNCH_SECRET). `measure` is the MAC (32 bytes), `nonce` the firmware's (16)."""

    def __init__(self, vm: Vm, policy: int, handle: int, measure: bytes, nonce: bytes) -> None:
        super().__init__(vm, policy, handle)
        self.measure = measure
        self.nonce = nonce

    def secret(self, header: bytes, ciphertext: bytes, hva: int, guest_len: int | None = None) -> None:
        """Put the owner's packet into guest memory at host virtual `hva`; stay inside one page.

        `guest_len` is the plaintext's length, which is the ciphertext's unless the packet is compressed.
        """
        self._require_open("LAUNCH_SECRET")
        if len(header) != SEV_SECRET_HEADER_SIZE:
            raise ValueError(f"a secret header has {SEV_SECRET_HEADER_SIZE} bytes, not {len(header)}")
        head = ctypes.create_string_buffer(header, len(header))
        trans = ctypes.create_string_buffer(ciphertext, len(ciphertext))
        self.vm.sev_op(
            s.KVM_SEV_LAUNCH_SECRET,
            s.kvm_sev_launch_secret(
                hdr_uaddr=ctypes.addressof(head),
                hdr_len=len(header),
                guest_uaddr=hva,
                guest_len=len(ciphertext) if guest_len is None else guest_len,
                trans_uaddr=ctypes.addressof(trans),
                trans_len=len(ciphertext),
            ),
        )

    def finish(self) -> Running:
        """LAUNCH_FINISH: the guest may run."""
        self._require_open("LAUNCH_FINISH")
        self.vm.sev_op(s.KVM_SEV_LAUNCH_FINISH)
        self._arrived(s.SEV_STATE_RUNNING)
        return Running(self.vm, self.policy, self.handle)


class Running(_InFirmware):
    """Launched: KVM_RUN is allowed."""
