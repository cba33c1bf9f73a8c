"""Questions that answer, crash, hang or find a broken promise, for the tests of ``make gpu-report``."""

import threading

from gpu.options import Options
from gpu.result import Result


def kept(result: Result, options: Options) -> None:
    result.show("table", "| a |")
    result.promise("is kept", True, f"scale {options.scale:g}")


def faster(result: Result, options: Options) -> None:
    result.promise(f"{options.required['plain']:g} times as fast", options.required["plain"] <= 25, "25")


def crash(result: Result, options: Options) -> None:
    result.promise("precedes the crash", True)
    raise ZeroDivisionError("on purpose")


def hang(result: Result, options: Options) -> None:
    result.show("table", "| before |")
    threading.Event().wait()
