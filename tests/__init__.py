"""What must hold, a file for each subject; `campaign` looks for faults.

A package, not a mere folder: some wheels bring a package called `tests`, which would hide it.
"""
