"""What every training code needs and no paper is about: weights, checkpoints, the log, command lines."""
