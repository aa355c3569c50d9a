"""Numbers and layouts of the KVM and SEV interfaces, in the kernel's own names, and nothing else.

Nothing here opens a file or knows of another package. Every number and offset is compared with the C headers of
the machine by tests/kvmapi/test_abi_headers.py; what those headers are too old to know is compared with a table.
"""
