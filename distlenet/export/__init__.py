"""The export of a trained network to files that other programs run: ``python -m distlenet.export``.

Offers ``exporter.export``. ``parity`` compares the files with the network, in a fresh process: ONNX without PyTorch.
"""
