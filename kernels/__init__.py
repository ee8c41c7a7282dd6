"""Experts and blocks on a GPU, experts and attention on an NPU, a bench, a compiler without a GPU."""
