"""Prediction: load a checkpoint's network, read image files, and classify them.

``trained_model.load_model`` is part of the Python API; ``predictor.Predictor`` and ``image_files.read_images`` are for
the command.
"""
