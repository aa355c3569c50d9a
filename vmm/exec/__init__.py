"""`sevmm exec`: unmodified KVM programs run against the model.

The program runs under a seccomp filter (filter.py) that hands its system calls on /dev/kvm, /dev/sev and the fds that
come from them to this process (notify.py, pool.py), which looks up what each fd is (files.py), asks the model
(dispatch.py), and answers. Guest RAM is the program's own memory, made shared in place where it is private (ram.py,
remap.py). How the parts fit: docs/exec.md.
"""
