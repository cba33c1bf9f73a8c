"""Checks that run before a job: every rank, every node and the network between them, then one trial step.

The command is ``python -m distlenet.preflight``. Benchmarks use ``preflight.allreduce`` to time all-reduces.
"""
