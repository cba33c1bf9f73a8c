"""Exact distributed training of a LeNet-style image classifier with PyTorch."""

__version__ = "0.1.0"
