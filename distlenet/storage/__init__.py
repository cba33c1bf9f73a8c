"""Runs in an object store: ``RunMirror`` copies a run directory, ``fetch`` reads it, ``Lease`` keeps other jobs away.

Only this package talks to an object store. The other packages read and write the copy on the local disk.
"""
