"""torchrun with a warm start: ranks are forked from a process that has imported everything.

``python -m distlenet.launch`` takes torchrun's arguments. It offers nothing to the other packages.
"""
