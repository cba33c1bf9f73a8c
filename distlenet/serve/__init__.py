"""Serve exported models over HTTP, without PyTorch: ``python -m distlenet.serve``.

``application.Application`` is the ASGI application; ``draining.DrainingServer`` runs it. Nothing here is for others.
"""
