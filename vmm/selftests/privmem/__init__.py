"""The RFC suite for fd-based private memory, `sev_priv_memfd_test` and `priv_memfd_test` of 2022, in the dialects upm-v6 and upm-v7.

`guest` is the C that all cases share, `shared` the host's half of the test memory, `rig` the machine and its conversions, `cases` the eight
cases: what the guest does and, below it, what the host does. The suites `sev_priv_memfd` and `priv_memfd` run them.
"""
