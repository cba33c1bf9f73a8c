"""Reports: read run directories, draw their charts, and write one self-contained page.

``runs.read_run`` and ``page.write_report`` are for other packages; ``python -m distlenet.report`` is the command.
The page and its charts need the optional dependencies ``distlenet[report]``; ``runs`` and ``replay`` do not.
"""
