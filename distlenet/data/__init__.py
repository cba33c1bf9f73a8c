"""Data sets, the order of samples over ranks, loading and preparation of batches."""
