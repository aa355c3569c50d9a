"""What the lab's kernel is made of, and why. Everything not named here is off (`make allnoconfig` with this as the preset).

KVM_AMD_SEV is on although TCG has no SEV: kernels on AMD hosts have it on, and then SEV's ioctls and attributes answer as a kernel without
the hardware does, not as a kernel without the code. It brings the secure processor's driver, and that the AMD IOMMU.
"""

from __future__ import annotations

GROUPS: dict[str, str] = {
    "the machine that QEMU shows": """
        64BIT SMP NUMA X86_64_ACPI_NUMA ACPI ACPI_NUMA PCI PCI_MSI X86_X2APIC X86_MSR X86_CPUID MTRR X86_PAT X86_MCE X86_MCE_AMD
        PROCESSOR_SELECT CPU_SUP_AMD CPU_SUP_INTEL HYPERVISOR_GUEST PARAVIRT PVH HPET_TIMER RTC_CLASS RTC_DRV_CMOS
        SERIAL_8250 SERIAL_8250_CONSOLE TTY UNIX98_PTYS VIRTIO_MENU VIRTIO_PCI VIRTIO_CONSOLE HW_RANDOM HW_RANDOM_VIRTIO
    """,
    "what is judged": """
        VIRTUALIZATION KVM KVM_AMD KVM_AMD_SEV KVM_SW_PROTECTED_VM KVM_SMM KVM_IOAPIC KVM_HYPERV KVM_XEN
        IOMMU_SUPPORT AMD_IOMMU DMADEVICES CRYPTO CRYPTO_HW CRYPTO_DEV_CCP CRYPTO_DEV_CCP_DD CRYPTO_DEV_SP_PSP CGROUPS CGROUP_MISC
    """,
    "memory as KVM's tests need it": """
        SHMEM TMPFS TMPFS_XATTR MEMFD_CREATE HUGETLBFS TRANSPARENT_HUGEPAGE TRANSPARENT_HUGEPAGE_MADVISE USERFAULTFD KSM COMPACTION
        MIGRATION IDLE_PAGE_TRACKING PROC_PAGE_MONITOR ADVISE_SYSCALLS
    """,
    "root over 9p under an overlay": """
        NET UNIX INET NETWORK_FILESYSTEMS NET_9P NET_9P_VIRTIO 9P_FS OVERLAY_FS FILE_LOCKING INOTIFY_USER
        BLK_DEV_INITRD DEVTMPFS PROC_FS SYSFS DEBUG_FS BINFMT_ELF BINFMT_SCRIPT
    """,
    "what programs call": """
        EXPERT MULTIUSER SYSCTL SYSFS_SYSCALL SYSVIPC POSIX_MQUEUE FUTEX FUTEX_PI EPOLL SIGNALFD TIMERFD EVENTFD AIO IO_URING MEMBARRIER
        RSEQ POSIX_TIMERS HIGH_RES_TIMERS NO_HZ_IDLE HZ_250 SECCOMP SECCOMP_FILTER BPF_SYSCALL CROSS_MEMORY_ATTACH PERF_EVENTS NAMESPACES
        ELF_CORE COREDUMP CHECKPOINT_RESTORE
    """,
    "words when it fails": "PRINTK PRINTK_TIME BUG KALLSYMS IKCONFIG IKCONFIG_PROC PANIC_ON_OOPS",
    "a quick start": "KERNEL_LZ4 CC_OPTIMIZE_FOR_PERFORMANCE DEBUG_INFO_NONE",
}

VALUES = {"LOCALVERSION": '"-lab"', "NR_CPUS": "8"}

OFF = (
    "MODULES", "CPU_MITIGATIONS", "WERROR", "KVM_WERROR", "LOCALVERSION_AUTO", "IPV6", "WIRELESS", "ETHERNET", "INPUT", "VT", "BLOCK",
    "MEMORY_HOTPLUG",
)  # fmt: skip
"""On by default, or dragged in, and only costing time to build and to boot."""

MUST = (
    "KVM", "KVM_AMD", "KVM_SW_PROTECTED_VM", "NET_9P_VIRTIO", "9P_FS", "OVERLAY_FS", "VIRTIO_CONSOLE", "VIRTIO_PCI", "DEVTMPFS",
    "BLK_DEV_INITRD", "SERIAL_8250_CONSOLE", "SMP",
)  # fmt: skip
"""Without these there is no lab; the others may be missing from a source, under another name, or not."""


def options() -> list[str]:
    """Names that are set to y."""
    return [name for names in GROUPS.values() for name in names.split()]


def preset() -> str:
    """The preset for `make allnoconfig`."""
    lines = [f"CONFIG_{name}=y" for name in options()]
    lines += [f"CONFIG_{name}={value}" for name, value in VALUES.items()]
    lines += [f"# CONFIG_{name} is not set" for name in OFF]
    return "\n".join(lines) + "\n"


def not_taken(config: str) -> tuple[list[str], list[str]]:
    """Options that `config` (a finished .config) does not have: those of MUST, and the others."""
    taken = {line.removeprefix("CONFIG_").partition("=")[0] for line in config.splitlines() if line.startswith("CONFIG_")}
    lacking = [name for name in options() if name not in taken]
    return [name for name in MUST if name not in taken], [name for name in lacking if name not in MUST]
