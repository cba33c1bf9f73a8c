"""Prediction: load a checkpoint's network, read image files, and classify them.

``predictor.Predictor`` and ``image_files.read_images`` are for other packages.
"""
