"""The suites, one module each; `sevmm selftest --list` names them."""
