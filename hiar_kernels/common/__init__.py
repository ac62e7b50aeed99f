"""What ops share: schemas, choice of an implementation, loading of Triton and CUDA kernels, compiling ahead of time."""
