"""The software model: a /dev/kvm and a /dev/sev in this process, behind the same system calls.

A program that works against the kernel works against the model, and fails there with the same errno.
"""
