"""The sum of the gradients of a global batch over ranks: by DistributedDataParallel, or without rounding.

Offers ``reducer.Reducer``, the protocol of both; ``factory.make_reducer``; ``replica_check.check_replicas``.
"""
