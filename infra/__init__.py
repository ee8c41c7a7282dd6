"""What every training code needs and no paper is about: weights on disk, checkpoints, the log, configurations."""
