"""The settings of a run: ``schema`` declares them, ``loading`` reads and validates them, ``arguments`` parses commands.

Other packages take a ``Config`` and read its attributes. ``python -m distlenet.config`` prints docs/settings.md.
"""
