"""A suite that cannot be imported."""

raise ValueError("on purpose")
