"""What to do about it: the one table of remedies, for exceptions and for `sevmm doctor` alike.

A remedy is a sentence that somebody at a terminal can follow: a BIOS setting, a module parameter, a limit, a permission, a command to
send first. `kvmapi.words` attaches remedies to (command, errno) and to firmware codes, `vmm.doctor_*` to what it finds missing, so that a
launch that fails and a doctor who looks say the same. Nothing here knows who refers to it, and nothing imports anything of ours.

Names of BIOS settings are those of AMD's reference setup (AMD CBS, CPU common options); vendors rename and move them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

_MODEL = "; or the model: --on model"


class Remedy(StrEnum):
    """A remedy is its text; the name is for code.

    >>> f"it fails; {Remedy.UNSIGNED}"
    'it fails; sign it with the key above it: OCA and CEK sign PEK, PEK signs PDH, ASK signs CEK, ARK signs ASK'
    """

    # --- the host: hardware, BIOS, modules
    SEV = "an AMD host with SEV: SMEE and SEV enabled in the BIOS, modules ccp and kvm_amd (sev=1) loaded" + _MODEL
    SEV_ES = (
        "an AMD host with SEV-ES: 'SEV-ES ASID Space Limit' above 1 in the BIOS (its ASIDs are 1 to limit - 1), kvm_amd sev=1 sev_es=1"
        + _MODEL
    )
    SNP = "an AMD host with SEV-SNP (RMP coverage enabled in the BIOS, kvm_amd sev_snp=1) and a VM of type SNP; the model has no SNP"
    KVM_AMD = "modprobe -r kvm_amd; modprobe kvm_amd sev=1 sev_es=1 (SEV must be enabled in the BIOS, too)" + _MODEL
    KVM_MODULE = "modprobe kvm_amd (or kvm_intel), with virtualisation enabled in the BIOS; in a virtual machine, nested virtualisation"
    CCP = "modprobe ccp, and look for 'ccp' and 'SEV' in dmesg: SEV must be enabled in the BIOS" + _MODEL
    PSP_DEAD = "look for 'ccp' in dmesg; a security processor that stopped answering comes back with a reboot, a cold one if need be"
    SW_PROTECTED = "a kernel with CONFIG_KVM_SW_PROTECTED_VM=y" + _MODEL
    ATTRIBUTES = "a kernel with CONFIG_KVM_SW_PROTECTED_VM=y, or a host with SEV-SNP or TDX" + _MODEL
    NEWER_KERNEL = "a kernel that has it" + _MODEL
    FIRMWARE = "update the SEV firmware: a newer BIOS, or amd/amd_sev_*.sbin of linux-firmware followed by a reload of ccp"
    BIOS_RESET = "load the BIOS's defaults for SEV and SEV-SNP, then enable them anew"
    RMP = "enable and enlarge 'SNP Memory (RMP Table) Coverage' in the BIOS, then see dmesg for 'SEV-SNP'"
    HARDWARE = "reboot, cold if it comes back; a machine that keeps saying so needs service"
    KERNEL_BUG = "the kernel does this itself before it asks the firmware: report it with dmesg"

    # --- the host: limits and permissions
    ASIDS_SEV = (
        "end another SEV guest, or give plain SEV more ASIDs in the BIOS ('SEV ASID Count'; a lower 'SEV-ES ASID Space Limit' leaves more),"
        " or raise sev in the cgroup's misc.max"
    )
    ASIDS_SEV_ES = (
        "end another SEV-ES guest, or raise 'SEV-ES ASID Space Limit' in the BIOS (plain SEV then has fewer),"
        " or raise sev_es in the cgroup's misc.max"
    )
    MEMLOCK = (
        "raise RLIMIT_MEMLOCK beyond the guest's memory (ulimit -l unlimited as root, or memlock in /etc/security/limits.conf),"
        " or run with CAP_IPC_LOCK"
    )
    MEMORY = "free memory, or raise the limits of this process and of its cgroup"
    FILES = "raise RLIMIT_NOFILE (ulimit -n)"
    SEV_WRITABLE = "open /dev/sev for writing, which needs root or a mode that lets you"
    KVM_NODE = "modprobe kvm_amd (or kvm_intel); in a container, pass it with --device" + _MODEL
    SEV_NODE = (
        "an AMD host with SEV enabled in the BIOS and module ccp loaded (modprobe ccp) has one; in a container, pass it with --device"
        + _MODEL
    )
    POLICY_OF_DEVICE = "a container or security policy forbids it: start the container with --device for this path"

    # --- what to send before, after or instead
    INIT2 = "create the VM with type SEV or SEV-ES and run KVM_SEV_INIT2 first"
    START_FIRST = (
        "run KVM_SEV_LAUNCH_START or RECEIVE_START first; a VM that took its context from another by MOVE has no /dev/sev of its own"
    )
    SEV_FD = "pass an open /dev/sev as sev_fd at LAUNCH_START or RECEIVE_START, and keep it open: later commands go through the same number"
    LAUNCH_ORDER = (
        "read KVM_SEV_GUEST_STATUS: a launch goes START, UPDATE_DATA, UPDATE_VMSA, MEASURE, SECRET, FINISH, each step once it is due"
    )
    PLATFORM_STATE = "read SEV_PLATFORM_STATUS: guest commands need INIT or WORKING, resets and imports that no guest exists"
    POLICY = (
        "launch with a policy that allows it: bit 0 NODBG forbids debugging, bit 3 NOSEND sending, bit 2 must be set for SEV-ES only,"
        " bits 16-31 must not ask for a newer firmware API"
    )
    LENGTH = "the needed length was written back: pass a buffer of that length (queries pass 0)"
    ALIGN = "use addresses and lengths that are multiples of 16 bytes"
    CERTIFICATE = "export the certificates anew (sevmm platform export): each has 2084 bytes, version 1, and its own place in the chain"
    UNSIGNED = "sign it with the key above it: OCA and CEK sign PEK, PEK signs PDH, ASK signs CEK, ARK signs ASK"
    OWNER_DATA = (
        "make session, packet or secret anew: policy, platform key, keys, lengths, API version and measurement must be those of this launch"
    )
    GIVE_BACK = "sevmm platform reset (SEV_FACTORY_RESET) gives the platform back first"
    END_GUESTS = "end the guests first"
    NEW_CONTEXT = "end this guest and begin with a new LAUNCH_START"
    FIELDS = "set reserved fields and unknown flags to 0, and check addresses and ranges against the command's structure"
    AGAIN = "call again"
    DEAD_VM = "use the VM that its context was moved to, or make a new one; a VM belongs to the process that made it"


@dataclass(frozen=True, init=False)
class Hint:
    """Why a call fails (`cause`: conditions, in the kernel's order) and what to do about it (`remedies`, most likely first).

    As text: the cause, then the remedies. Without remedies the cause says what the argument must be.

    >>> str(Hint("the security processor is absent", Remedy.END_GUESTS))
    'the security processor is absent; remedy: end the guests first'
    """

    cause: str
    remedies: tuple[str, ...]

    def __init__(self, cause: str, *remedies: str) -> None:
        object.__setattr__(self, "cause", cause)
        object.__setattr__(self, "remedies", remedies)

    def __str__(self) -> str:
        return "; or: ".join((f"{self.cause}; remedy: {self.remedies[0]}", *self.remedies[1:])) if self.remedies else self.cause


def open_device(path: str, group: str = "kvm", *, group_may: bool = True) -> str:
    """What to do when `path` (/dev/kvm, /dev/sev) refuses this user: join its group, or first let a group in.

    >>> open_device("/dev/kvm")
    'sudo usermod -aG kvm $USER and log in again (group kvm may open /dev/kvm); or run as root; or the model: --on model'
    """
    if group_may:
        return f"sudo usermod -aG {group} $USER and log in again (group {group} may open {path}); or run as root{_MODEL}"
    return f"sudo chgrp kvm {path} && sudo chmod 660 {path}, then join the group kvm; or run as root{_MODEL}"
