"""The toy world: a synthetic video world with ground truth, small enough that a laptop trains a model of it."""
