"""The server of exported models: its protocols, limits, versions, batches, and how it stops."""

import asyncio
import base64
import io
import itertools
import json
import os
import re
import select
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import requests
import tritonclient.http as triton
import uvloop
from conftest import LIMIT_S, clean_environment, run_command
from onnx import helper
from PIL import Image
from serve_models import CLASSES, IMAGES, serving, write_model, write_text_version, write_version
from tritonclient.utils import InferenceServerException

from distlenet.images.image_format import ImageFormat
from distlenet.serve import connections
from distlenet.serve.application import Application
from distlenet.serve.batching import Batcher
from distlenet.serve.connections import LimitedProtocol, make_config
from distlenet.serve.draining import backlog, refuse_new_connections
from distlenet.serve.endpoints import Endpoint, Endpoints
from distlenet.serve.image_upload import Options, image_file
from distlenet.serve.instances import read_tensorflow_inputs
from distlenet.serve.messages import ClientDisconnected, HttpError, Request, json_response
from distlenet.serve.request_metrics import RequestMetrics
from distlenet.serve.served_model import BadVersion, CannotCompute, ServedModel
from distlenet.serve.v2_protocol import parse_json, read_request
from distlenet.serve.versions import Versions
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
BODY_LIMIT = 2**20


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    write_version(root / "fashion", 1, seed=1)
    write_version(root / "fashion", 2, seed=2)
    write_text_version(root / "text")
    return root


@pytest.fixture(scope="module")
def fashion(models):
    return ServedModel(models / "fashion/2", 2, "model.onnx", 1)


@pytest.fixture(scope="module")
def server(models):
    with serving(models / "fashion", "--max-body-mb", "1") as server:
        yield server
        status, errors = server.stop()
    assert (status, errors.count("\n")) == (0, 1), errors  # no request of any test has left a traceback


def exchange(server, *parts: bytes) -> bytes:
    """Send bytes, close the sending side, and return all that the server answers."""
    answer = []
    # A server that has answered before it has read everything resets the connection after its answer.
    with (
        closing(socket.create_connection(("127.0.0.1", server.port), timeout=30)) as client,
        suppress(ConnectionError),
    ):
        with suppress(OSError):
            for part in parts:
                client.sendall(part)
            client.shutdown(socket.SHUT_WR)
        answer.extend(iter(lambda: client.recv(65536), b""))
    return b"".join(answer)


def receive_until(client: socket.socket, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end):
        part = client.recv(65536)
        assert part, data  # the server has closed the connection
        data += part
    return data


def wait_until_draining(server):
    deadline = time.monotonic() + 30
    while requests.get(f"{server.url}/readyz", timeout=30).status_code != 503:
        assert time.monotonic() < deadline


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def test_a_request_of_the_tensorflow_tutorial_is_answered(server, fashion):
    data = json.dumps({"signature_name": "serving_default", "instances": PIXELS.tolist()})
    headers = {"content-type": "application/json"}
    answer = requests.post(f"{server.url}/v1/models/fashion:predict", data=data, headers=headers, timeout=30)
    expected = fashion.run({"images": PIXELS})["predictions"]
    assert answer.status_code == 200
    # the digits identify the float32; another batch may be summed in another order: a few units in the last place
    np.testing.assert_allclose(np.float32(answer.json()["predictions"]), expected, rtol=1e-6)
    column = requests.post(f"{server.url}/v1/models/fashion:predict", json={"inputs": PIXELS.tolist()}, timeout=30)
    assert column.json() == {"outputs": answer.json()["predictions"]}


def test_older_versions_and_the_states_of_all(server, models):
    first = ServedModel(models / "fashion/1", 1, "model.onnx", 1).run({"images": PIXELS})["predictions"]
    url = f"{server.url}/v1/models/fashion"
    answer = requests.post(f"{url}/versions/1:predict", json={"instances": PIXELS.tolist()}, timeout=30)
    np.testing.assert_allclose(np.float32(answer.json()["predictions"]), first, rtol=1e-6)
    states = requests.get(url, timeout=30).json()["model_version_status"]
    assert [(state["version"], state["state"]) for state in states] == [("2", "AVAILABLE"), ("1", "AVAILABLE")]
    assert "model_version_status" in requests.get(f"{url}/versions/1", timeout=30).json()
    metadata = requests.get(f"{url}/metadata", timeout=30).json()
    inputs = metadata["metadata"]["signature_def"]["signature_def"]["serving_default"]["inputs"]["images"]
    assert [dim["size"] for dim in inputs["tensor_shape"]["dim"]] == ["-1", "28", "28"]
    assert metadata["distlenet"]["classes"] == CLASSES


@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient(server, fashion, binary):
    client = triton.InferenceServerClient(f"127.0.0.1:{server.port}")
    assert client.is_server_live()
    assert client.is_model_ready("fashion", "1")
    assert client.get_model_metadata("fashion")["inputs"] == [
        {"name": "images", "datatype": "UINT8", "shape": [-1, 28, 28]}
    ]
    images = triton.InferInput("images", PIXELS.shape, "UINT8")
    images.set_data_from_numpy(PIXELS, binary_data=binary)
    outputs = None if binary else [triton.InferRequestedOutput("outputs", binary_data=False)]
    result = client.infer("fashion", [images], outputs=outputs, request_id="a")
    assert result.get_response()["id"] == "a"
    np.testing.assert_allclose(result.as_numpy("outputs"), fashion.run({"images": PIXELS})["outputs"], rtol=1e-5)
    assert (result.as_numpy("predictions") is not None) == binary  # all outputs, unless some are requested
    with pytest.raises(InferenceServerException, match="expected one tensor"):
        client.infer("fashion", [triton.InferInput("other", [1, 28, 28], "UINT8").set_data_from_numpy(PIXELS[:1])])


def test_an_image_file_is_read_as_predict_reads_it(server, fashion):
    drawing = np.full((100, 60), 255, np.uint8)  # light: is inverted, and padded to a square
    drawing[20:80, 25:35] = 0
    answer = requests.post(f"{server.url}/predict?seen=1&top=2", data=png(drawing), timeout=30).json()
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["seen"]))))
    assert (seen.shape, seen[0, 0], seen[14, 14]) == ((28, 28), 0, 255)
    expected = fashion.run({"images": seen[None]})["predictions"][0]
    best = int(expected.argmax())
    assert answer["top"][0] == {
        "class": CLASSES[best],
        "label": best,
        "probability": pytest.approx(expected[best], 1e-6),
    }
    assert len(answer["top"]) == 2
    files = {"image": ("drawing.png", png(drawing))}
    form = requests.post(f"{server.url}/predict", files=files, data={"other": "x"}, timeout=30).json()
    assert form["top"][:2] == answer["top"]
    kept = requests.post(f"{server.url}/predict?invert=no&seen=1", data=png(drawing), timeout=30).json()
    assert np.asarray(Image.open(io.BytesIO(base64.b64decode(kept["seen"]))))[0, 0] == 255


PREDICT = "/v1/models/fashion:predict"


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", PREDICT, b"", 405),
        ("GET", "/v1/models/other", b"", 404),
        ("GET", "/v1/models/fashion/versions/7", b"", 404),
        ("POST", "/v1/models/fashion/versions/99999999999999999999:predict", b"{}", 404),
        ("POST", "/%2e%2e/%2e%2e/etc/passwd", b"", 404),
        ("POST", PREDICT, b"", 400),
        ("POST", PREDICT, b"[" * 100_000, 400),
        ("POST", PREDICT, b'{"instances": [[[0.5]]]}', 400),
        ("POST", PREDICT, b"\xff\x00" * 10, 400),
        ("POST", "/v2/models/fashion/infer", b'{"inputs": [{"name": "images"}]}', 400),
        ("POST", "/predict", b"no image", 400),
        ("POST", "/predict?top=11", b"", 400),
        ("POST", PREDICT, bytes(BODY_LIMIT + 1), 413),
    ],
)
def test_errors_of_a_client(server, method, path, body, status):
    answer = requests.request(method, server.url + path, data=body, timeout=30)
    assert (answer.status_code, [*answer.json()]) == (status, ["error"])
    if status == 405:
        assert answer.headers["allow"] == "POST"


def test_a_body_in_chunks_is_refused_when_it_becomes_too_large(server):
    head = b"POST /predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    with closing(socket.create_connection(("127.0.0.1", server.port), timeout=30)) as client:
        client.sendall(head + chunk * (BODY_LIMIT // 0x10000 + 1))  # no end: the answer does not wait for it
        assert status_of(client.recv(65536)) == 413


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nhost: x\r\na: " + b"a" * 70_000, 431),
        (b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-encoding: gzip\r\ncontent-length: 1\r\n\r\na", 415),
        (b"POST /predict HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 9999999\r\n\r\n", 413),
    ],
)
def test_requests_that_no_client_library_sends(server, request_, status):
    answer = exchange(server, request_)
    assert status_of(answer) == status
    if b"expect" in request_:  # the client may send the body, or not
        assert b"connection: close" in answer


def predict_request(headers: bytes = b"") -> bytes:
    body = json.dumps({"instances": PIXELS.tolist()}).encode()
    head = b"POST %s HTTP/1.1\r\nhost: x\r\n%scontent-length: %d\r\n\r\n"
    return head % (PREDICT.encode(), headers, len(body)) + body


def test_a_client_that_closes_its_side_receives_its_answers(server):
    answer = exchange(server, predict_request() * 2)
    assert answer.count(b"HTTP/1.1 200") == answer.count(b'"predictions"') == 2


def test_what_is_not_http_is_refused_after_the_answer_to_the_request_before(server):
    answer = exchange(server, predict_request() + b"garbage\r\n\r\n")
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"400"]
    assert answer.count(b'"predictions"') == 1


def test_a_request_for_another_protocol_is_answered_as_http_1(server):
    upgrade = predict_request(b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAM\r\n")
    cut = upgrade.index(b"\r\n\r\n") + 10
    answer = exchange(server, upgrade[:50], upgrade[50:cut], upgrade[cut:] + upgrade * 2)
    assert answer.count(b"HTTP/1.1 200") == answer.count(b'"predictions"') == 3
    assert status_of(exchange(server, b"CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n")) == 400


def test_large_headers_in_one_packet(server):
    header = b"a: " + b"a" * 40_000 + b"\r\n"
    assert status_of(exchange(server, b"GET /healthz HTTP/1.1\r\nhost: x\r\n" + header + b"\r\n")) == 200
    assert status_of(exchange(server, b"GET /healthz HTTP/1.1\r\nhost: x\r\n" + header * 2 + b"\r\n")) == 431


def test_a_connection_that_is_cut_within_a_request_disturbs_nobody(server):
    client = socket.create_connection(("127.0.0.1", server.port))
    client.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\nabc")
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() resets the connection
    client.close()
    assert requests.get(f"{server.url}/readyz", timeout=30).json() == {"ready": True}


def test_metrics_pages_and_the_description(server):
    assert requests.get(f"{server.url}/healthz", timeout=30).json() == {"live": True}
    text = requests.get(f"{server.url}/metrics", timeout=30).text
    assert "distlenet_model_version 2.0" in text
    assert 'distlenet_requests_total{endpoint="health",status="200"}' in text
    described = requests.get(f"{server.url}/openapi.json", timeout=30).json()["paths"]
    assert described["/v1/models/fashion:predict"]["post"]["requestBody"]
    assert requests.get(f"{server.url}/page.json", timeout=30).json() == {
        "backend": "server",
        "name": "fashion",
        "classes": CLASSES,
    }
    for path in ("/", "/docs", "/docs.js", "/docs.css"):
        answer = requests.get(server.url + path, timeout=30)
        assert (answer.status_code, re.findall(r"(?:src|href)=.https?:", answer.text)) == (200, []), path
        assert "default-src 'self'" in answer.headers["content-security-policy"]


def test_a_stop_answers_all_that_has_been_accepted(models):
    """A request that is being sent, one in the kernel's queue, and two on open connections; an idle one is closed."""
    request = predict_request()

    def connect():
        return socket.create_connection(("127.0.0.1", server.port), timeout=30)

    with serving(models / "fashion", "--drain-s", "4") as server:
        started, kept, idle = connect(), connect(), connect()
        started.sendall(request[:100])
        kept.sendall(request)
        assert b"connection: close" not in receive_until(kept, b"]]}")
        server.process.send_signal(15)
        wait_until_draining(server)
        late = connect()  # the listener is still open
        for client, data in ((late, request), (kept, request + request), (started, request[100:])):
            client.sendall(data)
        for client, count in ((late, 1), (kept, 2), (started, 1)):
            answer = b"".join(iter(lambda client=client: client.recv(65536), b""))
            assert answer.count(b"HTTP/1.1 200") == answer.count(b'"predictions"') == count
            assert answer.count(b"connection: close") == 1
        assert idle.recv(1) == b""
        assert server.wait()[0] == 0
        with pytest.raises(ConnectionRefusedError):
            connect()


def test_the_kernel_refuses_new_connections_and_keeps_those_that_wait():
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        waiting = socket.create_connection(listener.getsockname())
        assert select.select([listener], [], [], 30)[0]  # the client may be connected a moment earlier
        refuse_new_connections(listener)
        assert backlog(listener) == 1
        with closing(socket.socket()) as late:
            late.settimeout(0.1)
            with pytest.raises(TimeoutError):
                late.connect(listener.getsockname())
        accepted, _ = listener.accept()
        waiting.sendall(b"a")
        assert (accepted.recv(1), backlog(listener)) == (b"a", 0)
        waiting.close()
        accepted.close()


def test_a_second_signal_ends_the_server_at_once(models):
    with serving(models / "fashion", "--drain-s", "60") as server:
        server.process.send_signal(2)
        wait_until_draining(server)
        server.process.send_signal(15)
        assert server.wait()[0] == 128 + 15


def test_the_end_of_the_grace_period_ends_unfinished_requests(models):
    words = ("--max-wait-ms", "60000", "--drain-s", "0", "--grace-s", "0.1")  # a batch waits for others for a minute
    with serving(models / "fashion", *words) as server, socket.socket() as client:
        client.connect(("127.0.0.1", server.port))
        client.sendall(predict_request())
        assert requests.get(f"{server.url}/readyz", timeout=30).status_code == 200
        status, errors = server.stop()
    assert (status, errors.count("\n")) == (0, 2), errors  # the signal, and one unfinished request


def test_the_command_does_not_wait_for_threads_or_fail_for_a_full_disk(models):
    code = (
        "import threading\n"
        "from unittest import mock\n"
        "import distlenet.serve.__main__ as command\n"
        "def run(server, *_):\n"
        "    threading.Thread(target=threading.Event().wait).start()\n"
        "    server.on_start()\n"
        "with mock.patch.object(command.DrainingServer, 'run_with', run): command.run_command()"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, models / "text", "--port", "0"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=LIMIT_S, env=clean_environment())
    assert (ended.returncode, ended.stderr) == (0, b"")


SECOND_SIGNAL = """
def run(server, *_):
    server.handle_exit(15, None)
    server.handle_exit(15, None)
patch = mock.patch.object(command.DrainingServer, "run_with", run)
"""
FAILED_TASK = """
async def poll(*_):
    raise OSError
patch = mock.patch.object(command.Versions, "poll", poll)
"""


@pytest.mark.parametrize(("code", "status"), [(SECOND_SIGNAL, 128 + 15), (FAILED_TASK, 1)], ids=["signal", "task"])
def test_the_temporary_export_is_removed_at_a_sudden_end(models, tmp_path, code, status):
    export = f"lambda run, out, _: shutil.copytree({str(models / 'text')!r}, out, dirs_exist_ok=True)"
    before = "import shutil\nfrom unittest import mock\nimport distlenet.serve.__main__ as command\n"
    after = f"with patch, mock.patch.object(command, 'export_run', {export}): command.run_command()"
    (tmp_path / "run").mkdir()
    (tmp_path / "temporary").mkdir()
    command = (sys.executable, "-W", "ignore", "-c", before + code + after, tmp_path / "run", "--port", "0")
    ended = run_command(*command, env={"TMPDIR": str(tmp_path / "temporary")})
    assert ended.status == status, str(ended)
    assert list((tmp_path / "temporary").glob("distlenet-*")) == []


WITHIN_A_WRITE = """
import io, os, sys
from distlenet.serve.draining import DrainingServer
from distlenet.utils.errors import warn

class Stream(io.RawIOBase):
    def writable(self):
        return True

    def write(self, data):
        if not server.should_exit:
            server.handle_exit(15, None)
        os.write(2, data)
        return len(data)

server = DrainingServer.__new__(DrainingServer)
server.should_exit = False
sys.stderr = io.TextIOWrapper(io.BufferedWriter(Stream()))
warn("version 2 is served now")
"""


def test_a_signal_that_interrupts_a_write_starts_to_drain():
    """The pipe of standard error may be full: then the write waits, and the handler of the signal runs within it."""
    ended = run_command(sys.executable, "-W", "ignore", "-c", WITHIN_A_WRITE)
    first, second = ended.stderr.splitlines()
    assert (ended.status, first.split(":")[1:2], second) == (0, [" SIGTERM"], "distlenet: version 2 is served now")


def test_a_killed_server_of_an_exported_model_leaves_no_directory(models, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with serving(models / "text"):
        pass
    assert list(tmp_path.glob("distlenet-*")) == []


def test_ctrl_c_during_the_imports(tmp_path):
    (tmp_path / "uvloop.py").write_text("import os, time\nos.kill(os.getpid(), 2)\ntime.sleep(600)")
    environment = clean_environment()
    environment["PYTHONPATH"] = f"{tmp_path}:{environment.get('PYTHONPATH', '')}"
    command = [sys.executable, "-m", "distlenet.serve", tmp_path]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environment)
    assert (ended.returncode, ended.stderr) == (130, "distlenet: stopped by SIGINT (Ctrl-C)\n")


def test_the_server_imports_no_pytorch(models):
    code = (
        "import sys\n"
        "from unittest import mock\n"
        "import distlenet.serve.__main__ as command\n"
        "with mock.patch.object(command.DrainingServer, 'run_with', lambda *_: None): command.main()\n"
        "print(*{'torch', 'torchvision', 'omegaconf', 'wandb', 'onnx'} & sys.modules.keys())"
    )
    ended = run_command(sys.executable, "-W", "ignore", "-c", code, models / "text", "--port", "0").succeeded()
    assert ended.stdout == "\n", str(ended)


def read(model, body):
    try:
        return read_tensorflow_inputs(body, model)
    except HttpError as error:
        return str(error)


@pytest.mark.parametrize("shape", [(2, 28, 28), (2, 28, 28, 1), (2, 1, 28, 28)])
def test_layouts_of_grey_images(fashion, shape):
    images = read(fashion, {"instances": PIXELS[:2].reshape(shape).tolist()})["images"]
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, PIXELS[:2])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "expected a JSON object"),
        ({"instances": [], "inputs": []}, "expected a JSON object"),
        ({"instances": []}, "at least one sample"),
        ({"instances": 5}, "at least one sample"),
        ({"instances": [0], "signature_name": "other"}, "serving_default"),
        ({"instances": [[[0.5] * 28] * 28]}, "pixels are not scaled to 0..1"),
        ({"instances": [[[256] * 28] * 28]}, "from 0 to 255"),
        ({"instances": [[[None] * 28] * 28]}, "from 0 to 255"),
        ({"instances": [[["a"] * 28] * 28]}, "from 0 to 255"),
        ({"instances": [[[0] * 27 + [True]] * 28]}, "expected integers from 0 to 255"),
        ({"instances": [[[False] * 28] * 28]}, "expected integers from 0 to 255"),
        ({"instances": [[[10**30] * 28] * 28]}, "from 0 to 255"),
        ({"instances": [[[0] * 28] * 27]}, r"shape \[1, 27, 28\], expected \[N, 28, 28\]"),
        ({"instances": [[[0] * 28] * 27 + [[0] * 27]]}, "different lengths"),
        ({"instances": [[[0] * 28] * 28, 3]}, "different lengths"),
        ({"instances": [[[]]]}, "has empty lists"),
        ({"instances": [{"other": 0}]}, "input 'other' is unknown"),
        ({"instances": [{"images": 0}, 1]}, "same keys"),
        ({"instances": [[[[[[[0]]]]]]]}, "too deep"),
        ({"inputs": {}}, "input images is missing"),
        ({"instances": [{}] * 2}, "input images is missing"),
        ({"inputs": []}, "has empty lists"),
    ],
)
def test_instances_that_do_not_fit(fashion, body, message):
    with pytest.raises(HttpError, match=message) as caught:
        read_tensorflow_inputs(body, fashion)
    assert caught.value.status == 400


def test_inputs_by_name_of_other_types(models):
    model = ServedModel(models / "text/1", 1, "model.onnx", 1)
    rows = [{"words": [1, 2], "factor": [0.5]}, {"words": [3, 4], "factor": [1]}]
    inputs = read(model, {"instances": rows})
    assert {name: (array.dtype, array.tolist()) for name, array in inputs.items()} == {
        "words": (np.int64, [[1, 2], [3, 4]]),
        "factor": (np.float32, [[0.5], [1]]),
    }
    assert read(model, {"inputs": {"words": [[1.5]], "factor": [[1]]}}) == "words: expected values of type int64"
    assert read(model, {"inputs": {"words": [[True]], "factor": [[1]]}}) == "words: expected values of type int64"
    assert "different numbers" in read(model, {"inputs": {"words": [[1], [2]], "factor": [[1]]}})
    assert "expected an object" in read(model, {"instances": [1]})


@pytest.mark.parametrize("kind", ["[],", '{"a":0},'])
def test_json_of_a_million_lists_is_not_parsed(kind):
    body = b"[" + kind.encode() * 2**20 + b"0]"
    with pytest.raises(HttpError, match="more than 1,048,576 lists"):
        parse_json(body)
    assert len(parse_json(body[: 1 + 100_000 * len(kind)] + b"0]")) == 100_001


def test_values_must_be_finite(models):
    model = ServedModel(models / "text/1", 1, "model.onnx", 1)
    for value in (float("nan"), 1e308):  # 1e308 is infinite as float32
        assert "factor: has values that are not finite" in read(
            model, {"inputs": {"words": [[1]], "factor": [[value]]}}
        )
    inputs = {"words": np.array([[9, 9]]), "factor": np.float32([[1e38]])}
    with pytest.raises(CannotCompute, match="the output outputs is not finite"):
        model.run(inputs)


def test_a_batch_of_another_shape_is_refused_by_its_first_sample(fashion):
    class Sample(list):
        """Not a list of JSON: an error if it is read."""

    for body in ({"instances": [[[0]], Sample()]}, {"inputs": [[[0]], Sample()]}):
        assert "has shape [2, 1, 1], expected [N, 28, 28]" in read(fashion, body)


def v2_status(model, shape, outputs=None, data=None):
    tensor = {"name": "images", "datatype": "UINT8", "shape": shape, "data": PIXELS[0].ravel().tolist()}
    tensor |= {} if data is None else {"data": data}
    body = json.dumps({"inputs": [tensor], "outputs": outputs}).encode()
    try:
        read_request(Request("POST", "", b"", [], body), model)
    except HttpError as error:
        return error.status
    return 200


@pytest.mark.parametrize(
    "shape", [[1, 28, 28] + [1] * 97, [1, 28, 28] + [1] * 13 + [5], [1, 784], [2, 28, 14], [0, 28, 28], [784]]
)
def test_shapes_of_v2_that_do_not_fit(fashion, shape):
    assert v2_status(fashion, shape) == 400


def test_data_and_outputs_of_v2(fashion):
    for shape in ([1, 28, 28], [1, 1, 28, 28], [1, 28, 28, 1]):
        assert v2_status(fashion, shape) == v2_status(fashion, shape, data=PIXELS[:1].reshape(shape).tolist()) == 200
    assert v2_status(fashion, [1, 28, 28], data=[]) == 400
    assert v2_status(fashion, [1, 28, 28], [{"name": "outputs"}, {"name": "predictions"}]) == 200
    for outputs in ([{"name": "outputs"}] * 2, [{"name": "other"}], [{"name": "outputs"}] * 3, [0], {"a": 0}):
        assert v2_status(fashion, [1, 28, 28], outputs) == 400


def test_layouts_of_color_images():
    color = ImageFormat.from_dict({**IMAGES, "channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3})
    spec = SimpleNamespace(dtype=np.dtype(np.uint8), shape=(None, 3, 5, 4))
    model = SimpleNamespace(inputs={"images": spec}, images=color)
    pixels = np.arange(60, dtype=np.uint8).reshape(1, 3, 5, 4)
    for images in (pixels, pixels.transpose(0, 2, 3, 1)):
        assert np.array_equal(read(model, {"instances": images.tolist()})["images"], pixels)


class Model:
    """A network that doubles its inputs and cannot compute negative ones."""

    def __init__(self):
        self.sizes = []

    def run(self, inputs):
        self.sizes.append(len(inputs["x"]))
        if (inputs["x"] < 0).any():
            raise CannotCompute("negative")
        return {"y": 2 * inputs["x"]}


def with_batcher(batcher, *coroutines):
    """Run coroutines at once with a batcher; return their results or exceptions."""

    async def run():
        task = asyncio.create_task(batcher.run())
        results = await asyncio.gather(*coroutines, return_exceptions=True)
        task.cancel()
        await asyncio.wait([task])
        return results

    return asyncio.run(run())


def test_requests_that_wait_form_a_batch_and_shapes_are_apart():
    model, sizes = Model(), []
    batcher = Batcher(4, 60.0, 100, sizes.append)  # a full batch does not wait
    values = [np.full((1, 2), 0), np.full((1, 3), 1), np.full((1, 2), 2), np.full((1, 2), 3)]
    results = with_batcher(batcher, *(batcher.predict(model, {"x": value}) for value in values))
    for value, result in zip(values, results, strict=True):
        np.testing.assert_array_equal(result["y"], 2 * value)
    assert model.sizes == sizes == [3, 1]


def test_a_bad_sample_fails_alone():
    model = Model()
    batcher = Batcher(4, 0.0, 100, mock.Mock())
    results = with_batcher(batcher, *(batcher.predict(model, {"x": np.array([i])}) for i in (1, -1, 2)))
    assert [results[0]["y"].tolist(), results[2]["y"].tolist()] == [[2], [4]]
    assert isinstance(results[1], HttpError)
    assert results[1].status == 400


def test_a_large_request_is_split_and_a_full_queue_refuses():
    model = Model()
    batcher = Batcher(4, 0.0, 4, mock.Mock())
    large = batcher.predict(model, {"x": np.arange(10)})
    results = with_batcher(batcher, large, batcher.predict(model, {"x": np.arange(1)}))
    assert results[0]["y"].tolist() == (2 * np.arange(10)).tolist()
    assert model.sizes == [4, 4, 2]
    assert (results[1].status, results[1].headers) == (503, ((b"retry-after", b"1"),))


def test_a_sample_does_not_depend_on_its_batch(fashion):
    alone = np.concatenate([fashion.run({"images": image[None]})["outputs"] for image in PIXELS])
    # sums of 784 products in another order: at most 784 roundings of 2**-24 of the sum of the absolute products
    assert np.abs(fashion.run({"images": PIXELS})["outputs"] - alone).max() < 784 * 2**-24 * 10


def test_new_versions_are_served_and_bad_ones_are_not(tmp_path, capsys):
    write_version(tmp_path, 1, seed=1)
    versions = Versions(tmp_path, "model.onnx", 1)
    versions.start()
    write_version(tmp_path, 3, seed=3)
    versions.scan()
    assert (versions.newest().version, sorted(versions.loaded)) == (3, [1, 3])
    assert capsys.readouterr().err == ""
    bad = write_version(tmp_path, 4)
    with (bad / "model.onnx").open("r+b") as file:
        file.write(b"damage")
    (tmp_path / "5").mkdir()
    for _ in range(2):
        versions.scan()
    assert versions.newest().version == 3
    errors = capsys.readouterr().err.splitlines()
    assert (len(errors), versions.failure_count) == (2, 2)  # once each
    assert "SHA-256" in errors[1]
    with pytest.raises(HttpError, match=r"version 4 is not available: model\.onnx: its SHA-256"):
        versions.get(4)
    shutil.rmtree(bad)
    write_version(tmp_path, 4)  # repaired
    versions.scan()
    assert sorted(versions.loaded) == [3, 4]
    shutil.rmtree(tmp_path / "4")  # withdrawn
    versions.scan()
    assert sorted(versions.loaded) == [1, 3]
    shutil.rmtree(tmp_path)
    versions.scan()
    assert sorted(versions.loaded) == [1, 3]


def test_a_pipe_is_no_version_and_failures_of_removed_versions_are_forgotten(tmp_path, capsys):
    write_version(tmp_path, 1)
    bad = write_version(tmp_path, 2)
    (bad / "model.onnx").unlink()
    os.mkfifo(bad / "model.onnx")
    versions = Versions(tmp_path, "model.onnx", 1)
    versions.start()
    assert versions.failures == {2: "model.onnx: is not a regular file"}
    shutil.rmtree(bad)
    versions.scan()
    assert versions.failures == {}


def test_a_version_that_cannot_be_read_is_not_served(tmp_path):
    write_version(tmp_path, 1)
    versions = Versions(tmp_path, "model.onnx", 1)
    versions.start()
    unreadable = 300 * "x"  # an error of the file system for every user: ENAMETOOLONG
    (tmp_path / "2").mkdir()
    (tmp_path / "2/model.json").symlink_to(unreadable)
    (tmp_path / "3").symlink_to(unreadable)
    versions.scan()
    assert sorted(versions.loaded) == [1]
    assert versions.failures == dict.fromkeys((2, 3), "model.json: cannot be read: File name too long")
    (tmp_path / "2/model.json").unlink()
    shutil.copytree(tmp_path / "1", tmp_path / "2", dirs_exist_ok=True)
    versions.scan()
    assert sorted(versions.loaded) == [1, 2]


class ChangingVersions(Versions):
    """Another thread replaces ``loaded`` after each time that it is read."""

    numbers = itertools.cycle((1, 2))

    @property
    def loaded(self):
        number = next(self.numbers)
        return {number: SimpleNamespace(version=number)}

    @loaded.setter
    def loaded(self, _):
        pass


def test_versions_may_change_during_a_request():
    versions = ChangingVersions(Path("models"), "model.onnx", 1)
    assert {versions.newest().version for _ in range(2)} == {1, 2}
    endpoints = Endpoints("text", versions, Batcher(1, 0, 1, lambda _: None), RequestMetrics())
    for _ in range(4):
        with suppress(HttpError):
            assert versions.get(1).version == 1
        with suppress(HttpError):
            answer = asyncio.run(endpoints.v1_status(SimpleNamespace(version=1)))
            assert [state["version"] for state in json.loads(answer.body)["model_version_status"]] == ["1"]
        next(versions.numbers)


def test_a_version_that_is_being_loaded_does_not_delay_the_end(models):
    versions = Versions(models / "fashion", "model.onnx", 1)
    versions.start()
    release, ended = threading.Event(), []

    async def run():
        loop, started = asyncio.get_running_loop(), asyncio.Event()

        def scan():
            loop.call_soon_threadsafe(started.set)
            ended.append(release.wait(30))

        with mock.patch.object(versions, "scan", scan):
            task = asyncio.create_task(versions.poll(0.001))
            await started.wait()
            task.cancel()
            await asyncio.wait([task], timeout=30)
            assert (task.cancelled(), ended) == (True, [])

    try:
        asyncio.run(run())
    finally:
        release.set()


def test_the_number_of_the_current_directory(models, monkeypatch):
    monkeypatch.chdir(models / "fashion/2")
    versions = Versions(Path("."), "model.onnx", 1)
    versions.start()
    assert sorted(versions.loaded) == [2]


def change(path, **values):
    """Change values of a model.json; return the version's directory."""
    file = path / "model.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return path


@pytest.mark.parametrize("classes", [CLASSES[:9], "0123456789", [*range(10)], {}])
def test_classes_that_do_not_fit(tmp_path, classes):
    with pytest.raises(BadVersion, match="classes"):
        ServedModel(change(write_version(tmp_path), classes=classes), 1, "model.onnx", 1)


def test_only_a_classifier_of_images_reads_image_files(tmp_path):
    text = write_text_version(tmp_path)  # two inputs
    assert ServedModel(change(text, images=IMAGES), 1, "model.onnx", 1).images is None
    inputs, outputs = {"images": ("float32", [None, 28, 28])}, {"predictions": ("float32", [None, 28, 28])}
    nodes = [helper.make_node("Abs", ["images"], ["predictions"])]
    mask = write_model(tmp_path, 2, nodes, {}, inputs, outputs, images=IMAGES)
    assert ServedModel(mask, 2, "model.onnx", 1).images is None


def test_one_version_and_none(models, tmp_path):
    versions = Versions(models / "fashion/1", "model.onnx", 1)
    versions.start()
    assert sorted(versions.loaded) == [1]
    with pytest.raises(UserError, match="has no version"):
        Versions(tmp_path, "model.onnx", 1).start()
    with pytest.raises(UserError, match=r"has no model\.int8\.onnx; export it with --quantize int8"):
        Versions(models / "fashion", "model.int8.onnx", 1).start()


def call(application, path, headers=(), method="GET", body=b""):
    """Call an ASGI application; return the status and the body."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": body}

    async def send(message):
        sent.append(message)

    scope = {"method": method, "path": path, "query_string": b"", "headers": list(headers)}
    asyncio.run(application(scope, receive, send))
    return sent[0]["status"], sent[1]["body"]


def test_a_token(models, capsys):
    versions = Versions(models / "text", "model.onnx", 1)
    versions.start()
    metrics = RequestMetrics()
    table = Endpoints("text", versions, Batcher(1, 0.0, 1, mock.Mock()), metrics).table()
    application = Application("text", table, metrics, max_body=100, token=b"secret")
    assert call(application, "/v2")[0] == 401
    assert call(application, "/v2", [(b"authorization", b"Bearer secre")])[0] == 401
    assert call(application, "/v2", [(b"authorization", b"Basic secret")])[0] == 401
    assert call(application, "/v2", [(b"authorization", b"bearer secret")])[0] == 200
    assert call(application, "/healthz")[0] == 200


def test_large_bodies_share_a_limit_and_a_bug_is_an_answer(capsys):
    async def handler(request):
        return json_response({"size": len(request.body), "name": request.header(b"a").decode()})

    async def bug(request):
        raise ZeroDivisionError

    table = {"/v1/models/m:predict": {"POST": Endpoint("a", handler), "GET": Endpoint("b", bug)}}
    application = Application("m", table, RequestMetrics(), max_body=10**6)
    size = [(b"content-length", b"100000"), (b"a", b"name")]
    assert call(application, "/v1/models/m:predict", size, "POST", bytes(10)) == (200, b'{"size":10,"name":"name"}')
    assert application.large_bytes == 0
    assert call(application, "/v1/models/m:predict", method="POST", body=bytes(65537))[0] == 200
    assert application.large_bytes == 0
    application.large_bytes = 16 * 10**6
    assert call(application, "/v1/models/m:predict", size, "POST")[0] == 503
    assert call(application, "/v1/models/m:predict", method="POST", body=bytes(65537))[0] == 503  # in chunks
    assert call(application, "/v1/models/m:predict", method="POST", body=bytes(65536))[0] == 200
    assert call(application, "/v1/models/m:predict", [(b"content-length", b"10")], "POST")[0] == 200
    assert application.large_bytes == 16 * 10**6
    assert call(application, "/v1/models/m:predict")[0] == 500
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_slow_clients_do_not_take_the_memory_of_large_bodies():
    async def handler(request):
        return json_response({})

    application = Application("m", {"/p": {"POST": Endpoint("a", handler)}}, RequestMetrics(), max_body=10**6)

    async def run():
        parts = [{"type": "http.request", "body": b"a", "more_body": True}]

        async def receive():
            return parts.pop() if parts else await asyncio.Event().wait()

        scope = {"method": "POST", "path": "/p", "query_string": b"", "headers": [(b"content-length", b"1000000")]}
        slow = asyncio.create_task(application(scope, receive, None))
        while parts:
            await asyncio.sleep(0)
        taken = application.large_bytes
        slow.cancel()
        await asyncio.wait([slow])
        return taken

    assert asyncio.run(run()) == 0


def with_endpoints(path, run):
    """Return the result of ``run(endpoints)`` with the batcher's task."""
    versions = Versions(path, "model.onnx", 1)
    versions.start()
    batcher = Batcher(8, 0.0, 100, mock.Mock())
    return with_batcher(batcher, run(Endpoints("fashion", versions, batcher, RequestMetrics())))[0]


def test_an_image_whose_client_has_gone_is_not_decoded(models):
    decoded = []
    is_busy, go_on = threading.Event(), threading.Event()

    def decode(content, options, images):
        is_busy.set()
        go_on.wait(30)
        decoded.append(content)
        return PIXELS[0]

    async def run(endpoints):
        async def stays():
            await asyncio.Event().wait()

        async def goes():
            return {"type": "http.disconnect"}

        clients = [(b"first", stays), (b"gone", goes), (b"last", stays)]
        requests = [endpoints.predict(Request("POST", "", b"", [], body, receive=receive)) for body, receive in clients]
        tasks = [asyncio.create_task(request) for request in requests]
        await asyncio.to_thread(is_busy.wait, 30)
        go_on.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with mock.patch("distlenet.serve.endpoints.decode_image", decode):
        first, gone, last = with_endpoints(models / "fashion", run)
    assert decoded == [b"first", b"last"]
    assert first.status == last.status == 200
    assert isinstance(gone, ClientDisconnected)


def test_images_are_converted_to_the_type_of_the_network(tmp_path):
    nodes = [helper.make_node("ReduceMax", ["images", "axes"], ["predictions"], keepdims=0)]
    inputs, outputs = {"images": ("float32", [None, 28, 28])}, {"predictions": ("float32", [None, 28])}
    write_model(tmp_path, 1, nodes, {"axes": np.array([1])}, inputs, outputs, images=IMAGES)

    async def run(endpoints):
        async def stays():
            await asyncio.Event().wait()

        return await endpoints.predict(Request("POST", "", b"invert=no", [], png(PIXELS[0]), receive=stays))

    answer = json.loads(with_endpoints(tmp_path, run).body)
    assert answer["top"][0]["probability"] == PIXELS[0].max()


@pytest.mark.parametrize("size", [10, 70_000])
def test_large_bodies_are_read_in_a_thread(models, size):
    threads = []

    def read(request, model):
        threads.append(threading.current_thread())
        raise HttpError(400, "a")

    async def run(endpoints):
        await endpoints.v1_predict(Request("POST", "", b"", [], bytes(size)))

    with mock.patch("distlenet.serve.endpoints.read_v1", read):
        assert with_endpoints(models / "fashion", run).status == 400
    assert (threads == [threading.main_thread()]) == (size == 10)


@pytest.mark.parametrize("sent", [b"", b"POST / HTTP/1.1\r\n", b"POST / HTTP/1.1\r\ncontent-length: 9\r\n\r\nabc"])
def test_slow_clients_are_disconnected(sent):
    async def wait_for_ever(scope, receive, send):
        await asyncio.sleep(60)

    async def run():
        config = make_config(wait_for_ever, 1000)
        config.load()
        loop = asyncio.get_running_loop()
        state = SimpleNamespace(connections=set(), tasks=set(), default_headers=[], total_requests=0)
        protocol = config.http_protocol_class(config, state, {}, loop)
        assert isinstance(protocol, LimitedProtocol)
        transport = mock.Mock(**{"is_closing.return_value": False, "get_extra_info.return_value": None})
        transport.get_write_buffer_size.return_value = 0
        connected = loop.time()
        protocol.connection_made(transport)
        if sent:
            protocol.data_received(sent)
        await asyncio.sleep(0)  # the application starts
        protocol.check(connected + connections.SILENCE_S - 1)
        assert not transport.close.called
        assert not transport.abort.called
        protocol.check(loop.time() + connections.SILENCE_S + 1)
        assert transport.close.called or transport.abort.called
        for task in state.tasks:
            task.cancel()

    asyncio.run(run())


REQUEST = b"GET /v1/models/m:predict HTTP/1.1\r\nhost: x\r\n\r\n"


@asynccontextmanager
async def connected(handler, metrics, request):
    """Serve a handler; yield the server's protocol and tasks, and a client that has sent a request."""
    table = {"/v1/models/m:predict": {"GET": Endpoint("a", handler)}}
    config = make_config(Application("m", table, metrics, max_body=1000), 1000)
    config.load()
    loop = asyncio.get_running_loop()
    state = SimpleNamespace(connections=set(), tasks=set(), default_headers=[], total_requests=0)
    made = lambda: config.http_protocol_class(config, state, {}, loop)  # noqa: E731
    async with asyncio.timeout(30), await loop.create_server(made, "127.0.0.1", 0) as listener:
        with closing(socket.create_connection(listener.sockets[0].getsockname())) as client:
            client.setblocking(False)
            await loop.sock_sendall(client, request)
            yield state, client


async def until(condition):
    """Wait until a condition of the event loop is true; the caller has a timeout."""
    while not condition():
        await asyncio.sleep(0.001)


def run_uvloop(coroutine):
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(coroutine)


def test_a_client_that_leaves_while_its_requests_wait(caplog):
    metrics = mock.Mock()

    async def run():
        started, released = [], [asyncio.Event(), asyncio.Event()]

        async def handler(request):
            started.append(request)
            await released[len(started) - 1].wait()
            return json_response({})

        async with connected(handler, metrics, REQUEST * 3) as (state, client):
            await until(lambda: len(started) == 1)
            released[0].set()
            await until(lambda: len(started) == 2)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()  # resets the connection
            await until(lambda: state.connections == set())
            released[1].set()
            await until(lambda: state.tasks == set())

    run_uvloop(run())
    assert caplog.records == []
    assert [call.args[:2] for call in metrics.observe.call_args_list] == [("a", 200), ("a", 499)]


def test_a_client_that_does_not_read_its_answers_is_disconnected():
    async def handler(request):
        return json_response({"a": "a" * 10**6})

    async def run():
        loop = asyncio.get_running_loop()
        async with connected(handler, mock.Mock(), REQUEST * 100) as (state, _):
            await until(lambda: state.connections and next(iter(state.connections)).flow.write_paused)
            (protocol,) = state.connections
            protocol.check(loop.time())
            protocol.write_size += 1  # as if the client had read a byte
            protocol.check(loop.time() + connections.SILENCE_S + 1)
            assert not protocol.transport.is_closing()  # it reads slowly
            protocol.check(loop.time() + 2 * connections.SILENCE_S + 2)
            assert protocol.transport.is_closing()

    run_uvloop(run())


@pytest.mark.parametrize(
    "body", [b"", b"--b\r\n", b'--b\r\ncontent-disposition: form-data; name="a"\r\n\r\nx\r\n--b--\r\n']
)
def test_a_multipart_body_without_a_file(body):
    headers = [(b"content-type", b"multipart/form-data; boundary=b")]
    with pytest.raises(HttpError, match="multipart body"):
        image_file(Request("POST", "/predict", b"", headers, body))


def test_a_multipart_body_without_a_boundary():
    with pytest.raises(HttpError, match=r"^Content-Type: multipart/form-data has no boundary$"):
        image_file(Request("POST", "/predict", b"", [(b"content-type", b"multipart/form-data")], b"--b\r\n"))


def test_names_in_a_part_of_a_multipart_body_are_in_any_case():
    part = b"--b\r\nCONTENT-DISPOSITION: FORM-DATA; NAME=A; FILENAME=A\r\n\r\nx\r\n--b--\r\n"
    headers = [(b"content-type", b"multipart/form-data; boundary=b")]
    assert image_file(Request("POST", "/predict", b"", headers, part)) == b"x"


def test_a_multipart_body_has_at_most_100_parts():
    part = b"--b\r\ncontent-disposition: form-data; name=a; filename=a\r\n\r\nx\r\n"
    headers = [(b"content-type", b"multipart/form-data; boundary=b")]
    assert image_file(Request("POST", "/predict", b"", headers, 100 * part + b"--b--\r\n")) == b"x"
    with pytest.raises(HttpError, match="more than 100 parts"):
        image_file(Request("POST", "/predict", b"", headers, 101 * part + b"--b--\r\n"))


@pytest.mark.parametrize("query", [b"top=0", b"top=x", b"top=11", b"top=%FF", b"invert=maybe", b"\xff"])
def test_a_wrong_query(query):
    with pytest.raises(HttpError) as caught:
        Options.from_query(query, 10)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("DIR", "--port", "70000"), "expected an integer from 0 to 65535"),
        (("DIR", "--drain-s", "-1"), "expected a number"),
        (("DIR", "--poll-s", "0"), "expected a number above 0"),
        (("missing",), "missing: does not exist"),
        ((300 * "x",), "x: cannot be read: File name too long"),
        (("DIR", "--name", "a/b"), "does not fit a path"),
        (("DIR", "--token-file", "missing"), "--token-file missing: cannot be read"),
        (("DIR", "--host", "203.0.113.1"), "choose another address or port"),
    ],
)
def test_wrong_arguments(fails, models, monkeypatch, words, message):
    from distlenet.serve.__main__ import main

    words = [str(models / "fashion") if word == "DIR" else word for word in words]
    monkeypatch.setattr(sys, "argv", ["serve", *words])
    assert message in fails(main)
