"""The measurements behind scripts/bench: one function per entry, registered by `entry.entry`.

To add one, write a function that returns a `Measured` into a module here and list the module in `main.MODULES`. Ratios are taken within one
run, with the two sides interleaved, because machines differ and one machine differs from minute to minute; medians, not means.
"""
