"""The tests. A package by name, as some wheels install one called `tests` too, which would hide a mere folder."""
