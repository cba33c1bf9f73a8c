"""A fake W&B server on loopback: it answers the requests of W&B's real client and keeps what it receives.

Its ``behavior`` is ok, slow (answers after a second), error (500), wrong key (401), drop (closes the connection) or
hang (accepts requests and never answers). Modeled on the requests of wandb 0.31.
"""

import json
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, behavior: str = "ok") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behavior = behavior
        self.lock = threading.Lock()
        self.rows: dict[str, dict[int, dict[str, Any]]] = {}  # of each run, by index in its history
        self.sent_rows = 0  # including repetitions
        self.configs: dict[str, Any] = {}
        self.endings: dict[str, dict[str, Any]] = {}  # of each run: how its last process ended
        self.preempting: set[str] = set()
        self.sweep = ""  # its settings, as YAML
        self.trials: dict[str, dict[str, Any]] = {}  # parameters by run id, for an agent
        self.sweep_of: dict[str, str] = {}  # of each run
        self.queries: list[str] = []
        self.released = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def environ(self) -> dict[str, str]:
        # The process that sends has the lowest priority: W&B's start may take a minute on a busy machine.
        start = {"WANDB_MODE": "online", "WANDB_INIT_TIMEOUT": "600"}
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "k" * 40, **start}

    def history(self, run: str) -> list[dict[str, Any]]:
        rows = self.rows.get(run, {})
        return [rows[index] for index in sorted(rows)]

    def handle_error(self, *_: object) -> None:
        """Ignore clients that disconnect."""

    def close(self) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        self.answer({})

    def do_PUT(self) -> None:
        self.read()
        self.answer({})

    def do_POST(self) -> None:
        content = self.read()
        if self.path.endswith("/file_stream"):
            self.receive_files(self.path.split("/")[-2], content)
            self.answer({"exitcode": None, "limits": {}})
        else:
            with self.server.lock:
                self.server.queries.append(content.get("query", "")[:60])
            self.answer({"data": self.graphql(content)})

    def read(self) -> Any:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with suppress(ValueError):
            return json.loads(body)
        return {}

    def answer(self, content: object) -> None:
        behavior = self.server.behavior
        if behavior == "hang":
            self.server.released.wait()
        if behavior in ("drop", "hang"):
            self.close_connection = True
            return
        if behavior == "slow":
            time.sleep(1.0)
        body = json.dumps(content).encode()
        self.send_response({"error": 500, "wrong key": 401}.get(behavior, 200))
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def receive_files(self, run: str, content: dict[str, Any]) -> None:
        if self.server.behavior not in ("ok", "slow"):
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
                    for index, line in enumerate(part["content"], start=part["offset"]):
                        rows[index] = json.loads(line)
                        self.server.sent_rows += 1

    def next_trial(self, variables: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the commands for an agent: to start a trial that has not run, unless one runs."""
        rest = [run for run in self.server.trials if run not in self.server.sweep_of]
        if json.loads(variables["runState"]) or not rest:
            return []
        parameters = {key: {"value": value} for key, value in self.server.trials[rest[0]].items()}
        return [{"type": "run", "run_id": rest[0], "program": "distlenet.train", "args": parameters}]

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
        if "upsertSweep" in query:
            self.server.sweep = variables["config"]
            project["name"] = variables["projectName"]
            return {"upsertSweep": {"sweep": {"name": "sweep1", "project": project}, "configValidationWarnings": []}}
        if "SweepWithRuns" in query:
            return {"project": {"sweep": {"id": "s", "config": self.server.sweep, "runs": {"edges": []}}}}
        if "createAgent" in query:
            return {"createAgent": {"agent": {"id": "agent"}}}
        if "agentHeartbeat" in query:
            return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(self.next_trial(variables))}}
        if "upsertBucket" in query:
            if variables.get("sweep"):
                self.server.sweep_of[name] = variables["sweep"]
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
