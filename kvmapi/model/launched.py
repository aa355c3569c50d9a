"""A vCPU becomes an SEV-ES guest's: through LAUNCH_UPDATE_VMSA, or by a move from another VM.

Called with the vCPU's mutex held. What the ioctls for its registers answer afterwards is in protected.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmapi.abi.vmsa import SVM_SEV_FEAT_DEBUG_SWAP
from kvmapi.model.protected import ProtectedState

if TYPE_CHECKING:
    from kvmapi.model.ghcb.unit import GhcbUnit
    from kvmapi.model.vcpu import VcpuFile


def protect(vcpu: VcpuFile) -> None:
    """The VMSA is encrypted: from now on no ioctl shows or changes the guest's registers."""
    from kvmapi.model.ghcb.entry import from_vmsa

    vcpu.protected = ProtectedState(vcpu)
    from_vmsa(vcpu.cpu, vcpu.vm.type)
    vcpu.ghcb = _es_guest(vcpu, vcpu.protected)


def move(vcpu: VcpuFile, source: VcpuFile) -> None:
    """The guest of `source` moves to `vcpu`, registers and all; `source` is of a VM that dies. KVM does not make this vCPU's
    x87 and SSE state confidential: what KVM had of it before can still be read.
    """
    vcpu.protected = ProtectedState(vcpu, confidential_fpu=False)
    vcpu.protected.take_over(source)
    vcpu.ghcb = _es_guest(vcpu, vcpu.protected)
    if source.ghcb is not None:
        vcpu.ghcb.take_over(source.ghcb)
    source.protected = source.ghcb = None


def _es_guest(vcpu: VcpuFile, protected: ProtectedState) -> GhcbUnit:
    from kvmapi.model.ghcb.intercepts import Intercepts
    from kvmapi.model.ghcb.unit import GhcbUnit

    protected.begin()
    unit = GhcbUnit(vcpu, protected)
    Intercepts(unit, bool(vcpu.vm.sev.vmsa_features & SVM_SEV_FEAT_DEBUG_SWAP)).install()
    return unit
