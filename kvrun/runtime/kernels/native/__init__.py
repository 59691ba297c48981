"""Kernels for CPUs, in C: compiled where they are first used, if there is a compiler."""
