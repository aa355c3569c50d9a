"""SEV-ES guests: what raises #VC in them, and what VMGEXIT asks of the model's KVM.

    guest:  CPUID, OUT, ...  --(intercepts.py)-->  its #VC handler fills in a GHCB  --VMGEXIT--> unit.py
    KVM:    page.py (which fields count, which must be there)  ->  events.py, io.py, msr_protocol.py: one handler per request
    back:   unit.finish(): RAX, RBX, RCX and RDX into the GHCB, at the next entry

Two rules hold everywhere. KVM sees nothing of the guest's registers but what the guest wrote into the GHCB and marked as
valid. And everything in a GHCB is the guest's word: it is read once, checked, and no value of it ends in anything but an
answer to the guest, an exit to user space, or an errno of KVM_RUN.

Source: sev_handle_vmgexit and what it calls in arch/x86/kvm/svm/sev.c (7.3).
"""
