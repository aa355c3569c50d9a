"""The mutations: one rule of the model each, and the selftests that are there to notice.

A mutation is a piece of a module's text and what takes its place. The piece must stand in the module exactly `times` times: when the
model's text changes, the mutation fails loudly (`hook.mutated`) and is to be adapted here, not left out.

`tests` are patterns of `sevmm selftest`. They make a run short; that these tests fail is all that is asked. With --all-tests every
test is run.
"""

from __future__ import annotations

from dataclasses import dataclass

_MODEL = "kvmapi.model."


@dataclass(frozen=True)
class Mutation:
    """`rule`: what the mutated model gets wrong, in words. `module` is below kvmapi.model."""

    name: str
    rule: str
    module: str
    old: str
    new: str
    tests: tuple[str, ...]
    times: int = 1

    @property
    def full_module(self) -> str:
        """The module's name as it is imported."""
        return _MODEL + self.module


MEMORY = (
    Mutation(
        "ignore-attribute", "the PRIVATE attribute is ignored: all accesses go to shared memory", "mem.private",
        "        if self.private.has(gfn):\n", "        if False:\n", ("private_mem_conversions.explicit_conversion",),
    ),
    Mutation(
        "stale-after-attribute", "a vCPU goes on with the half of a page that it knew before the attribute changed", "vm",
        "self.physical.flush_range(gfn, pages)", "pass", ("private_mem_conversions.explicit_conversion",),
    ),
    Mutation(
        "unaligned-attributes", "KVM_SET_MEMORY_ATTRIBUTES takes addresses and sizes that are no whole pages", "vm",
        "not size or gpa + size >= _U64 or (gpa | size) & _IN_PAGE", "not size or gpa + size >= _U64",
        ("memory_attributes",),
    ),
    Mutation(
        "unknown-attributes", "KVM_SET_MEMORY_ATTRIBUTES takes attributes that do not exist", "vm",
        "flags or attributes & ~self._attributes or not size", "flags or not size", ("memory_attributes",),
    ),
    Mutation(
        "no-punch", "a hole in a guest_memfd keeps its contents", "guest_memfd",
        "real_fallocate(self._fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, offset, length)", "pass",
        ("private_mem_conversions.punch_hole",),
    ),
    Mutation(
        "wide-punch", "a hole in a guest_memfd takes the page behind it along", "guest_memfd",
        "min(length, self.bytes_ - offset)", "min(length + PAGE, self.bytes_ - offset)", ("private_mem_conversions.punch_hole*",),
    ),
    Mutation(
        "unaligned-punch", "fallocate of a guest_memfd takes parts of pages", "guest_memfd",
        "        if offset % PAGE or length % PAGE:\n", "        if False:\n", ("guest_memfd",),
    ),
    Mutation(
        "unaligned-memfd", "a guest_memfd may have a size that is no whole pages", "vm",
        "not 0 < size < 1 << 63 or size % PAGE", "not 0 < size < 1 << 63", ("guest_memfd",),
    ),
    Mutation(
        "mmap-private", "private memory of a guest_memfd can be read through mmap", "guest_memfd",
        "INIT_SHARED:\n            return self._mapping(", "INIT_SHARED or True:\n            return self._mapping(", ("guest_memfd",),
    ),
    Mutation(
        "memfd-flags", "KVM_CREATE_GUEST_MEMFD takes flags that do not exist", "vm",
        "if flags & ~supported_flags(has_private_memory(self.type)):", "if False:", ("guest_memfd",),
    ),
)  # fmt: skip

SLOTS = (
    Mutation(
        "unaligned-offset", "a memslot may begin in the middle of a guest_memfd's page", "memslots",
        "request.gmem_offset % PAGE or request.gmem_offset + request.size >= _U64", "request.gmem_offset + request.size >= _U64",
        ("set_memory_region.add*",),
    ),
    Mutation(
        "overlap", "memslots may overlap", "memslots",
        "and self.overlaps(gfn, pages, request.slot)", "and False", ("set_memory_region.add*",),
    ),
    Mutation(
        "shared-binding", "two memslots may have the same page of a guest_memfd", "guest_memfd",
        "            raise Errno(errno.EEXIST)", "            pass", ("set_memory_region.add*",),
    ),
    Mutation(
        "foreign-memfd", "a memslot may have another VM's guest_memfd", "guest_memfd",
        "if vm is not self.vm or (page", "if (page", ("set_memory_region.add*",),
    ),
    Mutation(
        "beyond-memfd", "a memslot may reach beyond the end of its guest_memfd", "guest_memfd",
        "vm is not self.vm or (page + pages) * PAGE > self.bytes_", "vm is not self.vm",
        ("set_memory_region.add*", "guest_memfd"),
    ),
    Mutation(
        "slot-flags", "memslots take flags that do not exist", "memslots",
        "        if request.flags & ~allowed:\n", "        if False:\n", ("set_memory_region.invalid*", "example.flags"),
    ),
    Mutation(
        "stale-after-delete", "a guest goes on using the memory of a memslot that was deleted", "vm",
        "self.physical.slot_gone(old)", "pass", ("hostile.racing_memslots[plain]",),
    ),
    Mutation(
        "stale-after-move", "a guest goes on using a memslot where it was before it moved", "vm",
        "            if old is not None:\n                self.physical.flush_range(old.gfn, old.pages)", "            pass",
        ("set_memory_region.move*",),
    ),
)  # fmt: skip

EXITS = (
    Mutation(
        "fault-not-private", "KVM_EXIT_MEMORY_FAULT says of every access that it was shared", "cpu.refusals",
        "cpu.page.memory_fault(why.gpa, why.private)", "cpu.page.memory_fault(why.gpa, False)", ("private_mem_kvm_exits",),
    ),
    Mutation(
        "fault-succeeds", "KVM_RUN returns 0 with a memory fault", "cpu.refusals",
        "        return -why.number\n", "        return 0\n", ("private_mem_kvm_exits",),
    ),
    Mutation(
        "hypercall-unaligned", "KVM hands unaligned conversions to the VMM", "cpu.hypercalls",
        "if gpa % PAGE or not pages or", "if not pages or", ("hostile.hypercall_storm",),
    ),
    Mutation(
        "hypercall-always", "MAP_GPA_RANGE exits though nobody asked for it", "cpu.hypercalls",
        "if number != _MAP_GPA_RANGE or not self._policy.hypercalls >> _MAP_GPA_RANGE & 1:", "if number != _MAP_GPA_RANGE:",
        ("sev_beyond.map_gpa_range_off",),
    ),
    Mutation(
        "hypercall-answer", "the guest is told that its conversion succeeded whatever the VMM answered", "cpu.hypercalls",
        "self._done(self._page.u64[_RET])", "self._done(0)", ("hostile.hypercall_storm",),
    ),
    Mutation(
        "pre-fault-nothing", "KVM_PRE_FAULT_MEMORY succeeds where no memory is", "prefault",
        "                return at, errno.ENOENT\n", "                continue\n", ("pre_fault_memory",),
    ),
)  # fmt: skip

SEV = (
    Mutation(
        "leak-plaintext", "what a guest writes to private memory stands in the VMM's memory in the clear", "mem.secure",
        "            frame.home[:] = frame.cipher\n", "            frame.home[:] = frame.plain\n", ("hostile.ping_pong",),
    ),
    Mutation(
        "no-tweak", "ciphertext does not depend on its address: it can be moved", "mem.cipher",
        'xts(address.to_bytes(16, "little"))', "xts(bytes(16))", ("hostile.plaintext_out_of_reach",), times=2,
    ),
    Mutation(
        "one-key", "all VMs have the same memory encryption key", "mem.cipher",
        "self.__key.fill_random()", "self.__key.set(bytes(range(_KEY_SIZE)))", ("hostile.plaintext_out_of_reach",),
    ),
    Mutation(
        "unmeasured-data", "LAUNCH_UPDATE_DATA does not measure what it encrypts", "sev.guest",
        "self._digest.update(plain)", "pass", ("sev_beyond.measurement",),
    ),
    Mutation(
        "unmeasured-vmsa", "the registers of an SEV-ES guest are not measured", "sev.guest",
        "self._digest.update(page)", "pass", ("sev_beyond.measurement",),
    ),
    Mutation(
        "unmeasured-policy", "the measurement does not say which policy the guest has", "sev.guest",
        '+ self.policy.to_bytes(4, "little")\n', "+ bytes(4)\n", ("sev_beyond.measurement",),
    ),
    Mutation(
        "same-nonce", "every launch is measured with the same nonce", "sev.guest",
        "        nonce = os.urandom(16)\n", "        nonce = bytes(16)\n", ("sev_beyond.measurement",),
    ),
    Mutation(
        "secret-unchecked", "a secret is injected whatever its packet's MAC", "sev.transport",
        "if not hmac.compare_digest(self._packet_mac(context, header[:_HEAD], guest_len, trans, measure), header[_HEAD:]):", "if False:",
        ("sev_beyond.secret*",),
    ),
    Mutation(
        "debug-forbidden", "memory of a guest whose policy forbids debugging can be decrypted", "sev.guest",
        "if self.policy & sev.SEV_POLICY_NODBG:", "if False:", ("hostile.plaintext_out_of_reach",),
    ),
    Mutation(
        "debug-blocks", "DBG_ENCRYPT of part of a block writes zeroes around it", "sev.debug_commands",
        "around = bytearray(command.issue(lambda guest: guest.dbg_decrypt(first, memory.read(first, whole))))", "around = bytearray(whole)",
        ("sev_dbg",),
    ),
    Mutation(
        "init-flags", "INIT2 takes flags that do not exist", "sev.commands",
        "if context.vm.vcpus or flags or", "if context.vm.vcpus or", ("sev_init2",),
    ),
    Mutation(
        "init-features", "INIT2 takes VMSA features that the machine does not have", "sev.commands",
        "or features & ~supported or", "or", ("sev_init2",),
    ),
    Mutation(
        "move-vcpu-count", "an SEV-ES guest may move to a VM with another number of vCPUs", "sev.sharing",
        "(len(ours) != len(theirs) or any(", "(any(", ("sev_migrate.sev_migrate_parameters",),
    ),
    Mutation(
        "mirror-with-vcpus", "a VM that has vCPUs may become a mirror", "sev.sharing",
        "or source.owner is not None or target.vm.vcpus:", "or source.owner is not None:", ("sev_migrate.sev_mirror_parameters",),
    ),
    Mutation(
        "mirror-launches", "a mirror may use commands that are its owner's", "sev.commands",
        "if context.owner is not None and number not in _MIRROR_MAY:", "if False:", ("sev_migrate.sev_mirror",),
    ),
    Mutation(
        "registers-shown", "KVM_GET_REGS and its relatives show the registers of an SEV-ES guest", "protected",
        "        if request in _REGISTERS and self._refuses:\n", "        if False:\n",
        ("sev_beyond.registers_hidden", "hostile_ghcb.lying_ghcb"),
    ),
)  # fmt: skip

GHCB = (
    Mutation(
        "ghcb-untold", "a field of the GHCB counts though the guest did not mark it as valid", "ghcb.page",
        "rdx if valid & _RDX else 0", "rdx", ("hostile_ghcb.lying_ghcb",),
    ),
    Mutation(
        "ghcb-incomplete", "a request is taken though a field that it needs is missing", "ghcb.unit",
        "return 0 if request.complete() else abi.GHCB_ERR_MISSING_INPUT", "return 0", ("hostile_ghcb.lying_ghcb",),
    ),
    Mutation(
        "ghcb-stale", "what a request marked as valid stays valid in the answer", "ghcb.page",
        "    page[_BITMAP_AT:_BITMAP_END] = bytes(16)\n", "", ("hostile_ghcb.lying_ghcb",),
    ),
    Mutation(
        "ghcb-usage", "a page that is no GHCB is taken for one", "ghcb.unit",
        "if request.usage != abi.GHCB_DEFAULT_USAGE:", "if False:", ("hostile_ghcb.lying_ghcb",),
    ),
    Mutation(
        "ghcb-buffer", "a request's buffer may lie anywhere in the GHCB, and reach beyond it", "ghcb.scratch",
        "if gpa < ghcb_gpa + page.SHARED_BUFFER_AT or end > ghcb_gpa + page.SHARED_BUFFER_END:", "if False:", ("hostile_ghcb.lying_ghcb",),
    ),
    Mutation(
        "ghcb-outside", "a request's buffer may lie outside of the GHCB in version 2 of the protocol", "ghcb.scratch",
        "if version >= abi.GHCB_PROTOCOL_MAX or size >", "if size >", ("hostile_ghcb.lying_ghcb",),
    ),
    Mutation(
        "ghcb-user", "a hypercall of user code is done", "ghcb.events",
        "    if request.cpl:\n", "    if False:\n", ("hostile_ghcb.lying_ghcb",),
    ),
    Mutation(
        "termination", "a guest's request for its termination is another system event", "ghcb.msr_protocol",
        "kvm.KVM_SYSTEM_EVENT_SEV_TERM, 1,", "kvm.KVM_SYSTEM_EVENT_CRASH, 1,", ("hostile_ghcb.lying_msr", "sev_smoke"),
    ),
)  # fmt: skip

DIALECTS = (
    Mutation(
        "rfc-mark", "MARK and CLR of a hypercall are ignored", "dialects.rule",
        "            self._mark_for_vcpu(gfn, within, mark)\n", "", ("priv_memfd.private_memory_private_access",),
    ),
    Mutation(
        "rfc-population", "in upm-v6 a page is private though its file has no memory for it", "dialects.rule",
        "file.file.has(page) if self._decides", "True if self._decides", ("upm.memory_fault_exit",),
    ),
    Mutation(
        "rfc-region", "in upm-v7 registered regions are not private", "dialects.rule",
        "else gfn in self.registered\n", "else False\n", ("upm.memory_fault_exit",),
    ),
    Mutation(
        "rfc-mismatch", "an access that contradicts what the page is goes to the page", "dialects.rule",
        "if access != private or (private", "if (private", ("upm.memory_fault_exit",),
    ),
    Mutation(
        "rfc-unmapped", "in UPM mode the guest's conversions do not say what its accesses are", "dialects.rule",
        "                self._say(first, count, private)\n", "                pass\n", ("sev_priv_memfd.upm_mode",),
    ),
)  # fmt: skip

MUTATIONS = (*MEMORY, *SLOTS, *EXITS, *SEV, *GHCB, *DIALECTS)
SHORT = ("no-punch", "ignore-attribute", "leak-plaintext", "ghcb-stale", "unaligned-offset")
"""For CI: one of each kind."""
