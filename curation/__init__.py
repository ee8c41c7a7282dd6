"""Making datasets out of datasets, with the models that one has: `python -m curation` lists what there is."""
