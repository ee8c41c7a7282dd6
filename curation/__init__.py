"""Making datasets out of datasets, with the models that one has."""
