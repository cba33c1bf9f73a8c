"""``python -m distlenet.launch``: torchrun, with its arguments, whose ranks start warm.

DISTLENET_WARM_START=0 starts each rank in a new interpreter, as torchrun itself does.
"""

from distlenet.utils.startup import exit_on_ctrl_c

if __name__ == "__main__":
    exit_on_ctrl_c()  # before the imports that take seconds; then torchrun's agent has its own handlers

import os
import sys

from distlenet.launch.warm_start import ForkServer

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun would set the same; before torch is imported
    server = ForkServer() if os.environ.get("DISTLENET_WARM_START", "1") != "0" else None

    from distlenet.launch.agent import run_agent

    if server is not None:
        from distlenet.launch.forked_rank import use_fork_server

        use_fork_server(server)
    sys.exit(run_agent())
