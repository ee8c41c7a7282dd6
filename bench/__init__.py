"""Are we fast? One script a question, each run with `python -m bench.NAME`."""
