"""The selftests: tests of a KVM, and the frame they are written in (docs/selftests.md).

A test is a function `test_*` in a module of `vmm.selftests.suites`. What it needs it names as parameters (`vmm.selftests.fixtures`);
on which VM types and dialects it makes sense, `runs_on` says. `sevmm selftest` runs them in processes of their own, pytest runs the same
functions through the plugin. Tests import `vmm.selftests.api` and nothing else of this package.
"""
