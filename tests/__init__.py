"""The suite behind `make test` and `make test-slow`.

A package, not a mere folder: some wheels bring a package called `tests`, which would hide it.
"""
