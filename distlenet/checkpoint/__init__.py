"""Checkpoints: their format, the folder that keeps them, and which one a run goes on from."""
