"""Prediction: load a checkpoint's network, and classify images, which ``distlenet.images`` reads.

``trained_model.load_model`` is part of the Python API; ``predictor.Predictor`` is for the command.
"""
