"""An S3 server, moto's, that fails as a test or a person requests: ``python tests/s3_server.py [HOST [PORT]]``.

``PUT /_faults`` with a JSON object replaces the faults: {"kind": ..., "times": ..., "method": ..., "path": ...}. The
first ``times`` requests whose method and path match the regular expressions fail; without ``times``, all do.
"""

import json
import re
import socket
import sys
import threading
import urllib.request

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "runs"
ERRORS = {
    "error": (500, "InternalError", "We encountered an internal error. Please try again."),
    "busy": (503, "SlowDown", "Please reduce your request rate."),
    "wrong_key": (403, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records."),
    "exists": (412, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold"),
    "full": (507, "QuotaExceeded", "The bucket has no space left."),
}


class FaultyApp:
    """A WSGI application that lets some requests fail, and passes the others to moto."""

    def __init__(self):
        self.app = DomainDispatcherApplication(create_backend_app)
        self.faults = {}
        self.replaced = threading.Event()  # set when other faults replace these: slow requests then continue
        self.counts = {}  # requests by method and result, for tests
        self.hook = lambda _method, _path: None  # called before each request, for tests
        self.lock = threading.Lock()

    def __call__(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if path == "/_faults":
            body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            with self.lock:
                counts, self.counts = self.counts, {}
                self.faults = json.loads(body or b"{}")
                self.replaced.set()
                self.replaced = threading.Event()
            start_response("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(counts).encode()]
        self.hook(method, path)
        kind = self.next_fault(method, path)
        with self.lock:
            key = f"{method} {kind or 'ok'}"
            self.counts[key] = self.counts.get(key, 0) + 1
        if kind == "cut":  # after a part of the body
            environ["wsgi.input"].read(min(100, int(environ.get("CONTENT_LENGTH") or 0)))
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            start_response("500 Cut", [])
            return [b""]
        if kind == "slow":
            self.replaced.wait(self.faults.get("seconds", 1.0))
        if kind in ERRORS:
            status, code, message = ERRORS[kind]
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(f"{status} {code}", [("Content-Type", "application/xml")])
            return [f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()]
        return self.app(environ, start_response)

    def next_fault(self, method, path):
        with self.lock:
            faults = self.faults
            matches = re.fullmatch(faults.get("method", ".*"), method) and re.search(faults.get("path", ""), path)
            if "kind" not in faults or not matches or faults.get("times", 1) == 0:
                return None
            if "times" in faults:
                faults["times"] -= 1
            return faults["kind"]


class QuietHandler(WSGIRequestHandler):
    def log_request(self, *_):
        pass


class S3Server:
    """The server, in a thread of this process, with an empty bucket ``runs``."""

    def __init__(self, host="127.0.0.1", port=0):
        self.app = FaultyApp()
        self.server = make_server(host, port, self.app, threaded=True, request_handler=QuietHandler)
        self.url = f"http://{host}:{self.server.port}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/{BUCKET}", method="PUT"), timeout=30).close()

    def fail(self, **faults):
        """Replace the faults; return the counts of requests since the last call."""
        return set_faults(self.url, **faults)

    def close(self):
        self.server.shutdown()


def set_faults(url, **faults):
    request = urllib.request.Request(f"{url}/_faults", data=json.dumps(faults).encode(), method="PUT")
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.loads(response.read())


if __name__ == "__main__":
    server = S3Server(*sys.argv[1:2], *map(int, sys.argv[2:3]))
    for name, value in server.environment.items():
        print(f"export {name}={value}")
    print(f"# run.dir=s3://{BUCKET}/PREFIX", flush=True)
    threading.Event().wait()
