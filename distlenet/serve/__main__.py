"""``python -m distlenet.serve DIR_OR_RUN``: answer predictions over HTTP."""

from distlenet.utils.startup import exit_on_ctrl_c, unwind_on

if __name__ == "__main__":
    exit_on_ctrl_c()  # before the imports that take seconds

import argparse
import contextlib
import gc
import ipaddress
import logging
import os
import re
import resource
import signal
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from distlenet.utils.errors import UserError, printable, warn
from distlenet.utils.exported_model import INT8
from distlenet.utils.parser import Parser, positive_int

try:
    from distlenet.serve.application import Application
    from distlenet.serve.batching import Batcher
    from distlenet.serve.connections import make_config
    from distlenet.serve.draining import DrainingServer
    from distlenet.serve.endpoints import Endpoints
    from distlenet.serve.exporting import export_run, is_model
    from distlenet.serve.request_metrics import RequestMetrics
    from distlenet.serve.static_files import page_table
    from distlenet.serve.versions import Versions
except ModuleNotFoundError as error:
    MISSING: ModuleNotFoundError | None = error
else:
    MISSING = None

NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser("python -m distlenet.serve", description="Answer predictions over HTTP, without PyTorch.")
    parser.add_argument(
        "model", metavar="DIR_OR_RUN", help="an exported model, one of its versions, or a run to export"
    )
    parser.add_argument("--name", help="the name of the model in paths (the one in model.json)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all (127.0.0.1)")
    parser.add_argument("--port", type=port, default=8000, help="0: any free port (8000)")
    parser.add_argument("--int8", action="store_true", help=f"serve {INT8}")
    parser.add_argument("--token-file", metavar="FILE", type=Path, help="requests need the token in this file")
    parser.add_argument("--max-batch", metavar="N", type=positive_int, default=64, help="samples per batch (64)")
    parser.add_argument(
        "--max-wait-ms",
        metavar="MS",
        type=non_negative_float,
        default=2.0,
        help="the longest wait for others when idle (2)",
    )
    parser.add_argument(
        "--max-queue", metavar="N", type=positive_int, help="samples that wait before others get 503 (16 batches)"
    )
    parser.add_argument("--max-body-mb", metavar="MB", type=positive_int, default=16, help="largest body (16)")
    parser.add_argument(
        "--drain-s",
        metavar="S",
        type=non_negative_float,
        default=0.5,
        help="time to listen further after SIGTERM (0.5)",
    )
    parser.add_argument(
        "--grace-s", metavar="S", type=non_negative_float, default=30.0, help="time to finish after that (30)"
    )
    parser.add_argument("--threads", metavar="N", type=positive_int, help="threads per batch (usable cores)")
    parser.add_argument(
        "--poll-s", metavar="S", type=positive_float, default=2.0, help="interval of the search for new versions (2)"
    )
    return parser


def port(text: str) -> int:
    """Return a port number, for argparse."""
    if text.isascii() and text.isdecimal() and len(text) < 6 and int(text) < 65536:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text}: expected an integer from 0 to 65535")


def non_negative_float(text: str) -> float:
    """Return a number of at least 0, for argparse."""
    if re.fullmatch(r"\d{1,6}(\.\d{1,6})?|\.\d{1,6}", text, re.ASCII):
        return float(text)
    raise argparse.ArgumentTypeError(f"{text}: expected a number, at least 0")


def positive_float(text: str) -> float:
    """Return a number above 0, for argparse."""
    if number := non_negative_float(text):
        return number
    raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")


def main() -> None:
    """Read the arguments, export a run if one is given, and serve until a signal. Raise UserError."""
    if MISSING is not None:
        raise UserError(f"{MISSING.name}: not installed; pip install 'distlenet[serve]'")
    arguments = make_parser().parse_args()
    path = Path(arguments.model)
    with contextlib.ExitStack() as stack:
        if not is_model(path):
            if not path.exists() and "://" not in arguments.model:
                raise UserError(f"{path}: does not exist; expected an exported model, a run or a checkpoint")
            temporary = tempfile.TemporaryDirectory(prefix="distlenet-", ignore_cleanup_errors=True)
            path = Path(stack.enter_context(temporary))
            export_run(arguments.model, path, arguments.int8)
        serve(path, arguments, on_exit=stack.close)


def serve(path: Path, arguments: argparse.Namespace, on_exit: Callable[[], None]) -> None:
    """Serve the versions in a directory until SIGTERM or SIGINT; ``on_exit`` as for DrainingServer."""
    token = read_token(arguments.token_file) if arguments.token_file else None
    threads = arguments.threads or len(os.sched_getaffinity(0))
    versions = Versions(path, INT8 if arguments.int8 else "model.onnx", threads)
    versions.start()
    name = arguments.name or versions.newest().name
    if not NAME.fullmatch(name):
        raise UserError(f"the name {name[:100]!r} does not fit a path; give another one with --name")
    metrics = RequestMetrics()
    max_queue = arguments.max_queue or 16 * arguments.max_batch
    batcher = Batcher(arguments.max_batch, arguments.max_wait_ms / 1000, max_queue, metrics.observe_batch)
    metrics.watch(batcher, versions)
    endpoints = Endpoints(name, versions, batcher, metrics)
    table = endpoints.table() | page_table(name, versions, token is not None)
    max_body = arguments.max_body_mb * 2**20
    application = Application(name, table, metrics, max_body=max_body, token=token)
    listener = listen(arguments.host, arguments.port)
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    if not is_loopback(arguments.host) and token is None:
        warn(f"--host {arguments.host}: anyone who reaches this port can send requests; consider --token-file")
    allow_many_connections()
    silence_parsers()
    gc.freeze()  # what exists now stays: collections skip it
    url = f"http://{host}:{listener.getsockname()[1]}"
    line = printable(f"Serving {name}, version {versions.newest().version}, at {url}")
    server = DrainingServer(
        make_config(application, max_body),
        arguments.drain_s,
        arguments.grace_s,
        on_start=lambda: print_start(line),
        on_drain=endpoints.start_draining,
        on_exit=on_exit,
    )
    server.run_with([listener], batcher.run(), versions.poll(arguments.poll_s))


def print_start(line: str) -> None:
    """Print the address. Ignore a failure, such as a full disk."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


def read_token(file: Path) -> bytes:
    """Return the token in a file. Raise UserError."""
    try:
        token = file.read_bytes().strip()
    except OSError as error:
        raise UserError(f"--token-file {file}: cannot be read: {error.strerror}") from error
    if not token or not token.isascii() or any(byte <= 32 for byte in token):
        raise UserError(f"--token-file {file}: expected one word of ASCII characters")
    return token


def listen(host: str, number: int) -> socket.socket:
    """Return a bound socket. Raise UserError if the address cannot be used."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)  # a second server on this port fails now, not later
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {number}: {reason}; choose another address or port") from error
    return listener


def is_loopback(host: str) -> bool:
    """Return whether an address can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def allow_many_connections() -> None:
    """Raise the limit of open files to what the system permits."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def silence_parsers() -> None:
    """Print nothing for an invalid file of a client, which is an answer with status 400.

    The C library of TIFF still prints one line for a damaged file, to the standard error of the process.
    """
    warnings.filterwarnings("ignore", module="PIL")
    for name in ("PIL", "python_multipart"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def run_command() -> NoReturn:
    """Run the command and exit: 0 stopped, 2 user error, 130 Ctrl-C before the start. It imports no PyTorch."""
    signal.set_wakeup_fd(-1)  # of exit_on_ctrl_c
    unwind_on(signal.SIGTERM, signal.SIGINT)  # before the start: removes the export
    try:
        main()
    except UserError as error:
        warn(str(error))
        sys.exit(2)
    os._exit(0)  # does not wait for threads that decode an image or load a version


if __name__ == "__main__":
    run_command()
