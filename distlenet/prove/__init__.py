"""A proof, by experiment, that a user's task keeps every promise of the engine; on a difference, the hook to correct.

The command is ``python -m distlenet.prove``. Other packages use nothing of this one.
"""
