"""Is the paper right? One short experiment a claim, each run with `python -m claims.NAME`."""
