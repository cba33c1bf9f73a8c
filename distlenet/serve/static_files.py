"""The files of the page, and the pages of the server itself."""

import html
import json
import mimetypes
from pathlib import Path

from distlenet.serve.endpoints import Endpoint
from distlenet.serve.messages import Request, Response, json_response
from distlenet.serve.openapi import describe
from distlenet.serve.served_model import ServedModel, TensorSpec
from distlenet.serve.versions import Versions

PAGE = Path(__file__).parent.parent / "page"
DOCS = Path(__file__).parent
SUFFIXES = {".html", ".js", ".css", ".svg", ".png", ".ico"}
CSP = (
    b"default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; object-src 'none'; base-uri 'none'; "
    b"form-action 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", CSP),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
)
HTML = b"text/html; charset=utf-8"


def page_table(name: str, versions: Versions, needs_token: bool) -> dict[str, dict[str, Endpoint]]:
    """Return {path: {"GET": endpoint}} of the page, its files, and the description of the interface.

    They need no token. They contain the name, inputs and outputs of the model, but no class names.
    """
    files = {f"/{path.name}": path for path in PAGE.glob("*.*") if path.suffix in SUFFIXES}
    table = {path: _file(file) for path, file in files.items()}
    table |= {f"/{path.name}": _file(path) for path in DOCS.glob("docs.*")}
    table["/docs"] = table.pop("/docs.html")

    async def page(request: Request) -> Response:
        model = versions.newest()
        if model.images is None or "/index.html" not in files:
            return Response(_plain_page(name, model).encode(), 200, HTML, HEADERS)
        return await table["/index.html"]["GET"].handler(request)

    async def backend(_: Request) -> Response:
        known = {"token": True} if needs_token else {"classes": versions.newest().classes}
        return json_response({"backend": "server", "name": name, **known})

    async def openapi(_: Request) -> Response:
        return json_response(describe(name, versions.newest(), needs_token))

    table |= {
        "/": {"GET": Endpoint("page", page, True)},
        "/page.json": {"GET": Endpoint("page", backend, True)},
        "/openapi.json": {"GET": Endpoint("openapi", openapi, True)},
    }
    return table


def _file(path: Path) -> dict[str, Endpoint]:
    """Return the endpoint of a file, which is read now."""
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    content_type = f"{kind}; charset=utf-8" if kind.startswith("text/") else kind
    response = Response(path.read_bytes(), 200, content_type.encode(), HEADERS)

    async def handler(_: Request) -> Response:
        return response

    return {"GET": Endpoint("page", handler, True)}


def example_body(model: ServedModel) -> str:
    """Return a request with one sample of zeros, for ``curl``; dimensions that vary have length 1."""
    values = {}
    for name, spec in model.inputs.items():
        value: object = False if spec.dtype.kind == "b" else 0
        for dim in reversed(spec.shape[1:]):
            value = [value] * (dim or 1)
        values[name] = value
    return json.dumps({"instances": [values if len(values) > 1 else next(iter(values.values()))]})


def _shape_text(spec: TensorSpec) -> str:
    return " × ".join("any" if dim is None else str(dim) for dim in spec.shape)


def _plain_page(name: str, model: ServedModel) -> str:
    """Return a page for a model without image input: its inputs, its outputs, and a request."""
    rows = "".join(
        f"<tr><td>{part}</td><td>{html.escape(key)}</td><td>{spec.dtype}</td><td>{_shape_text(spec)}</td></tr>"
        for part, specs in (("input", model.inputs), ("output", model.outputs))
        for key, spec in specs.items()
    )
    body = example_body(model)
    shown = body if len(body) < 1000 else '{"instances": [...]}'
    line = f"curl -d '{shown}' http://HOST:PORT/v1/models/{name}:predict"
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><link rel="icon" href="icon.svg">'
    return (
        f'<!doctype html><html lang="en">{head}<link rel="stylesheet" href="docs.css"><title>{name}</title>'
        f"<main><h1>{name}, version {model.version}</h1><div><table><thead><tr><th>tensor</th><th>name</th>"
        f"<th>type</th><th>shape</th></tr></thead><tbody>{rows}</tbody></table></div>"
        f'<p>Send a request:</p><pre><code>{html.escape(line)}</code></pre><p><a href="docs">All paths</a></p></main>'
        "</html>"
    )
