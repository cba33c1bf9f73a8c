"""Helpers without knowledge of training: errors, files, processes, exact sums, keyed random numbers.

Every other package may import this one; it imports no other. The package itself does not import torch.
"""
