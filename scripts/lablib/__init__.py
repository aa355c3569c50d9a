"""The lab behind scripts/lab: a small virtual machine whose kernel has the real kvm_amd.

QEMU's TCG emulates SVM and nested paging, so a kernel inside it offers a real /dev/kvm on any x86-64 machine, without SEV but with all that
SW_PROTECTED VMs need. The parts, in the order in which `scripts/lab setup` needs them:

1. `cache`     steps: a directory per step under a key of its inputs, finished when `complete.json` is there
2. `packages`  what the machine must have, and which Debian packages bring it
3. `source`    the newest linux-source package that the configured mirror has, through a private apt root
4. `kernel`    options (`kconfig`) and build
5. `initrd`    the first process of the guest (`init.c`, `streams.c`) and the job it gets
6. `machine`   QEMU, and the channels that make a command inside look like a command outside
7. `selftests` the kernel's own KVM tests: build, run (`inside_selftests`), table

The guest's root is the host's root, read-only over 9p, under an overlay in the guest's memory: interpreter, environment, compiler and tree
are the host's own, and nothing that runs inside can change a file outside.
"""
