"""Runs in an object store: ``stored_run`` opens one to train it, ``fetch`` reads one.

Only this package talks to an object store. The other packages read and write the local copy, a directory on the disk.
"""
