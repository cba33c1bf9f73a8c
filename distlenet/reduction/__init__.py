"""How the gradients of a global batch are summed over ranks: by DistributedDataParallel, or without rounding.

Offers ``reducer.Reducer``, the protocol of both; ``factory.make_reducer``; ``replica_check.check_replicas``.
"""
