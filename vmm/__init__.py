"""The virtual machine monitor: guest memory, conversions, devices, run loop, launch and the reports of a run.

The one call most users need is `vmm.run.run_guest`; the pieces below it are plain objects that tests and tools put together themselves.
Nothing is imported here, so that a command that runs one small guest does not pay for what it does not use.
"""
