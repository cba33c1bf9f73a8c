"""Built-in models. ``registry`` creates a model by its name; ``lenet`` holds ``Net``.

This package imports nothing from other packages.
"""
