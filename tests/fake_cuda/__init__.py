"""A CUDA runtime for machines without a GPU, on which PyTorch's CUDA builds compute real numbers; see README.md."""
