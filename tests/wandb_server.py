"""A stand-in for W&B's server, on loopback: it answers what the real client asks, and keeps what arrives.

``manner`` says how it behaves: well, slow (answers after a second), error (500), wrong key (401), drop (closes the
connection), hang (takes requests and never answers). Made by watching what the client of wandb 0.31 sends.
"""

import json
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, manner: str = "well") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.manner = manner
        self.lock = threading.Lock()
        self.rows: dict[str, dict[int, dict[str, Any]]] = {}  # of each run, by their place in its history
        self.sent_rows = 0  # with repetitions
        self.configs: dict[str, Any] = {}
        self.endings: dict[str, dict[str, Any]] = {}  # of each run: how its last process ended, as W&B is told
        self.preempting: set[str] = set()
        self.asked: list[str] = []
        self.released = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def environ(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "k" * 40, "WANDB_MODE": "online"}

    def history(self, run: str) -> list[dict[str, Any]]:
        rows = self.rows.get(run, {})
        return [rows[place] for place in sorted(rows)]

    def handle_error(self, *_: object) -> None:
        """A client that goes away is none."""

    def close(self) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.answer({})

    def do_PUT(self) -> None:
        self.read()
        self.answer({})

    def do_POST(self) -> None:
        content = self.read()
        if self.path.endswith("/file_stream"):
            self.take_files(self.path.split("/")[-2], content)
            self.answer({"exitcode": None, "limits": {}})
        else:
            with self.server.lock:
                self.server.asked.append(content.get("query", "")[:60])
            self.answer({"data": self.graphql(content)})

    def read(self) -> Any:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with suppress(ValueError):
            return json.loads(body)
        return {}

    def answer(self, content: object) -> None:
        manner = self.server.manner
        if manner == "hang":
            self.server.released.wait()
        if manner in ("drop", "hang"):
            self.close_connection = True
            return
        if manner == "slow":
            time.sleep(1.0)
        body = json.dumps(content).encode()
        self.send_response({"error": 500, "wrong key": 401}.get(manner, 200))
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def take_files(self, run: str, content: dict[str, Any]) -> None:
        if self.server.manner not in ("well", "slow"):
            return
        with self.server.lock:
            if content.get("preempting"):
                self.server.preempting.add(run)
            if content.get("complete"):
                self.server.endings[run] = {
                    "exitcode": content["exitcode"],
                    "preempting": run in self.server.preempting,
                }
                self.server.preempting.discard(run)
            for name, part in (content.get("files") or {}).items():
                if name == "wandb-history.jsonl":
                    rows = self.server.rows.setdefault(run, {})
                    for place, line in enumerate(part["content"], start=part["offset"]):
                        rows[place] = json.loads(line)
                        self.server.sent_rows += 1

    def graphql(self, content: dict[str, Any]) -> Any:
        query, variables = content.get("query", ""), content.get("variables") or {}
        name = variables.get("name") or variables.get("run") or ""
        project = {"id": "p", "name": "distlenet", "entity": {"id": "e", "name": "tester"}}
        if "RunResumeStatus" in query:
            history = self.server.history(name)
            if not history:
                return {"model": {"id": "p", "name": "distlenet", "entity": project["entity"], "bucket": None}}
            bucket = {
                "id": "b",
                "name": name,
                "summaryMetrics": "{}",
                "displayName": name,
                "logLineCount": 0,
                "historyLineCount": len(history),
                "eventsLineCount": 0,
                "historyTail": json.dumps([json.dumps(history[-1])]),
                "eventsTail": "[]",
                "config": "{}",
                "tags": [],
                "wandbConfig": json.dumps({"t": 1}),
            }
            return {"model": {"id": "p", "name": "distlenet", "entity": project["entity"], "bucket": bucket}}
        if "upsertBucket" in query:
            if config := variables.get("config"):
                with self.server.lock:
                    self.server.configs[name] = json.loads(config)
            bucket = {"id": "b", "name": name, "displayName": name, "sweepName": None, "project": project}
            bucket["historyLineCount"] = len(self.server.history(name))
            return {"upsertBucket": {"bucket": bucket, "inserted": not self.server.history(name)}}
        if "createRunFiles" in query:
            files = [{"name": file, "uploadUrl": f"{self.server.url}/upload"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if "artifact(name" in query:
            return {"project": {"artifact": None}}
        if "artifactType" in query:
            return {"project": {"artifactType": {"name": name or "type"}}}
        if "createArtifact(" in query:
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"id": "s", "latestArtifact": None}}
            return {"createArtifact": {"artifact": artifact}}
        if "viewer" in query:
            return {
                "viewer": {"id": "u", "entity": "tester", "username": "tester", "flags": "{}", "teams": {"edges": []}}
            }
        if "serverInfo" in query:
            return {"serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None, "features": []}}
        return {}
