"""The sizes that kernels are compiled for ahead of time: those of a small and of a large transformer in use."""

HEAD_DIM = 128
HEADS = (12, 40)
CHANNELS = tuple(heads * HEAD_DIM for heads in HEADS)
