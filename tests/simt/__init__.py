"""The kernels of csrc/cuda on the CPU: see README.md."""
