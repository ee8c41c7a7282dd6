"""The campaign of faults: kills, full disks, damage, hostile input, mutants. `python -m tests.campaign`."""
