"""Data sets and batches: built-in image data, the order of samples over ranks, loading, and the sample log.

``sources`` opens the built-in data sets, ``sampler`` and ``loader`` turn any map-style dataset into batches of a rank,
``sample_log`` records which samples each rank used. ``python -m distlenet.data`` downloads and verifies a data set.
"""
