"""The sizes that kernels are compiled for ahead of time: those of a small and of a large transformer in use."""

HEAD_DIM = 128
HEADS = (12, 40)
CHANNELS = tuple(heads * HEAD_DIM for heads in HEADS)
FEED_FORWARD = {1536: 8960, 5120: 13824}
"""Channels of the hidden layer of the feed-forward by those of the model."""
