"""The ranks of a job: environment, rendezvous, process group, collectives, device, precision, stop requests, failures.

Commands start with ``run_entry`` and enter ``init_distributed``, which yields a ``DistributedContext``; other packages
use that context and the functions of ``collectives``.
"""
