"""The networks and their weights: transformer, KV cache, text encoder, VAE, checkpoints."""
