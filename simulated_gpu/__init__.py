"""The GPU kernels run on the CPU: the CUDA operators with their own host code (`device`), and what both cost by a model."""
