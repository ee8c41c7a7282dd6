"""The experts of a MoE layer on a GPU, the bench that measures them, and a compiler without a GPU."""
