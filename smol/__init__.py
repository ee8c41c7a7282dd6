"""A real language model learns to see: SmolLM2-135M from a wheel, our ViT and adapter (`make smol`)."""
