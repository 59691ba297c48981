"""The kernels themselves, in Triton: same file names, functions and arguments as their twins."""
