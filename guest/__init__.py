"""The bundled guests: one small freestanding program per property.

`catalogue` says which there are and what each proves, `build` turns one into an ELF file, `patterns` computes the bytes
that they write, for tests that look into their memory. The package stands alone: it knows neither the VMM nor kvmapi;
docs/seams.md section 4 is all that the two sides share.
"""
