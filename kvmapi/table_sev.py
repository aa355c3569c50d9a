"""Commands inside KVM_MEMORY_ENCRYPT_OP and SEV_ISSUE_CMD, and the one row of /dev/sev."""

from __future__ import annotations

from kvmapi.abi import psp
from kvmapi.abi import sev as c
from kvmapi.rows import Command, Ioctl

SEV: tuple[Ioctl, ...] = (Ioctl("SEV_ISSUE_CMD", psp.SEV_ISSUE_CMD, "sev", psp.sev_issue_cmd, "inout", None, "run a platform command"),)

_GUEST = (
    (c.KVM_SEV_INIT, None, "make a type-0 VM an SEV guest: takes an ASID, initialises the platform"),
    (c.KVM_SEV_ES_INIT, None, "the same, for SEV-ES"),
    (c.KVM_SEV_LAUNCH_START, c.kvm_sev_launch_start, "begin a launch: policy, owner's certificate and session"),
    (c.KVM_SEV_LAUNCH_UPDATE_DATA, c.kvm_sev_launch_update_data, "encrypt memory in place and add it to the digest"),
    (c.KVM_SEV_LAUNCH_UPDATE_VMSA, None, "encrypt every vCPU's registers and add them to the digest"),
    (c.KVM_SEV_LAUNCH_SECRET, c.kvm_sev_launch_secret, "put the owner's secret into guest memory"),
    (c.KVM_SEV_LAUNCH_MEASURE, c.kvm_sev_launch_measure, "close the digest and return its MAC"),
    (c.KVM_SEV_LAUNCH_FINISH, None, "end the launch: the guest may run"),
    (c.KVM_SEV_SEND_START, c.kvm_sev_send_start, "begin sending the guest to another platform"),
    (c.KVM_SEV_SEND_UPDATE_DATA, c.kvm_sev_send_update_data, "wrap one page for the destination"),
    (c.KVM_SEV_SEND_UPDATE_VMSA, None, "reserved: the kernel has no such command"),
    (c.KVM_SEV_SEND_FINISH, None, "end sending"),
    (c.KVM_SEV_RECEIVE_START, c.kvm_sev_receive_start, "begin receiving a guest"),
    (c.KVM_SEV_RECEIVE_UPDATE_DATA, c.kvm_sev_receive_update_data, "unwrap one page into guest memory"),
    (c.KVM_SEV_RECEIVE_UPDATE_VMSA, None, "reserved: the kernel has no such command"),
    (c.KVM_SEV_RECEIVE_FINISH, None, "end receiving: the guest may run"),
    (c.KVM_SEV_GUEST_STATUS, c.kvm_sev_guest_status, "read handle, policy and state"),
    (c.KVM_SEV_DBG_DECRYPT, c.kvm_sev_dbg, "read guest memory in the clear, where the policy allows"),
    (c.KVM_SEV_DBG_ENCRYPT, c.kvm_sev_dbg, "write guest memory from the clear, where the policy allows"),
    (c.KVM_SEV_CERT_EXPORT, None, "reserved: the kernel has no such command"),
    (c.KVM_SEV_GET_ATTESTATION_REPORT, c.kvm_sev_attestation_report, "have the platform sign the launch digest"),
    (c.KVM_SEV_SEND_CANCEL, None, "give up sending; the guest runs on here"),
    (c.KVM_SEV_INIT2, c.kvm_sev_init, "initialise a VM of type SEV, SEV-ES or SNP"),
    (c.KVM_SEV_SNP_LAUNCH_START, c.kvm_sev_snp_launch_start, "begin an SNP launch"),
    (c.KVM_SEV_SNP_LAUNCH_UPDATE, c.kvm_sev_snp_launch_update, "add pages to an SNP launch"),
    (c.KVM_SEV_SNP_LAUNCH_FINISH, c.kvm_sev_snp_launch_finish, "end an SNP launch"),
    (c.KVM_SEV_SNP_ENABLE_REQ_CERTS, None, "let certificate requests exit to user space"),
)

GUEST_COMMANDS: dict[int, Command] = {number: Command(number, c.COMMAND_NAMES[number], struct, words) for number, struct, words in _GUEST}
"""KVM_SEV_* by id."""

PLATFORM_COMMANDS: dict[int, Command] = {
    command.id: command
    for command in (
        Command(psp.SEV_FACTORY_RESET, "SEV_FACTORY_RESET", None, "forget the owner and all keys of the platform"),
        Command(psp.SEV_PLATFORM_STATUS, "SEV_PLATFORM_STATUS", psp.sev_user_data_status, "version, state, guests"),
        Command(psp.SEV_PEK_GEN, "SEV_PEK_GEN", None, "make a new platform endorsement key"),
        Command(psp.SEV_PEK_CSR, "SEV_PEK_CSR", psp.sev_user_data_pek_csr, "ask for a certificate for that key"),
        Command(psp.SEV_PDH_GEN, "SEV_PDH_GEN", None, "make a new Diffie-Hellman key"),
        Command(
            psp.SEV_PDH_CERT_EXPORT,
            "SEV_PDH_CERT_EXPORT",
            psp.sev_user_data_pdh_cert_export,
            "the Diffie-Hellman certificate and its chain",
        ),
        Command(
            psp.SEV_PEK_CERT_IMPORT,
            "SEV_PEK_CERT_IMPORT",
            psp.sev_user_data_pek_cert_import,
            "take the platform for an owner",
        ),
        Command(psp.SEV_GET_ID, "SEV_GET_ID", psp.sev_user_data_get_id, "chip ids, two sockets (deprecated)"),
        Command(psp.SEV_GET_ID2, "SEV_GET_ID2", psp.sev_user_data_get_id2, "chip ids"),
        Command(psp.SNP_PLATFORM_STATUS, "SNP_PLATFORM_STATUS", psp.sev_user_data_snp_status, "SNP firmware status"),
        Command(psp.SNP_COMMIT, "SNP_COMMIT", None, "make the running firmware the oldest that may run"),
        Command(psp.SNP_SET_CONFIG, "SNP_SET_CONFIG", psp.sev_user_data_snp_config, "configure SNP reports"),
        Command(psp.SNP_VLEK_LOAD, "SNP_VLEK_LOAD", psp.sev_user_data_snp_vlek_load, "load a wrapped endorsement key"),
    )
}
"""SEV_* and SNP_* of /dev/sev by id."""
