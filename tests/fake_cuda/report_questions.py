"""Questions of ``make gpu-report`` for the test on the fake GPU: the program as it is, with fewer runs."""

import os

from gpu import speed, syncs
from gpu.options import Options
from gpu.result import Result


def crash(result: Result, options: Options) -> None:
    os.abort()


def fp32(result: Result, options: Options) -> None:
    speed.ask(result, options, "fp32", batches=(16,), promised=16)


def one_run(result: Result, options: Options) -> None:
    syncs.ask(result, options, [("fp32", "auto")])
