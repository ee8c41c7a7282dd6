"""The tests. A package by name: some wheels bring one called `tests` too, which would hide a mere folder."""
