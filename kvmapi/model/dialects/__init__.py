"""RFC dialects of private memory (kvmapi.abi.dialects): what kernels between 2022 and 2023 would have been.

    memfd.py       MFD_INACCESSIBLE files, and a slot's half in one
    rule.py        who gets an access: what the page is, what the access is
    physical.py    guest-physical memory with private halves
    hypercalls.py  MAP_GPA_RANGE's MARK and CLR bits, pending requests
    launch.py      contents of private memory before the first run
    vm.py          the VM's ioctls

Nothing here is loaded for a machine that speaks mainline.
"""
