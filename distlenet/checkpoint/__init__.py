"""Checkpoints: ``format`` is one file, ``store`` the directory that keeps a run's files.

``compatibility`` chooses the checkpoint from which a run resumes, ``manager`` saves and restores on all ranks.
"""
