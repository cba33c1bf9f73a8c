"""Image files in requests, and the answer of ``distlenet predict --json``."""

import base64
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

import numpy as np
from PIL import Image
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from distlenet.images.decoding import UnreadableImage
from distlenet.images.image_files import read_image
from distlenet.images.image_format import ImageFormat
from distlenet.serve.messages import HttpError, Request
from distlenet.serve.served_model import ServedModel

MAX_PARTS = 100  # of a multipart body
TOP = 3  # classes, as in distlenet predict
INVERT = ("auto", "yes", "no")


@dataclass(frozen=True)
class Options:
    """The query of ``POST /predict``."""

    top: int
    invert: str
    seen: bool

    @classmethod
    def from_query(cls, query: bytes, classes: int) -> "Options":
        """Read a query string. Raise HttpError if a value is invalid."""
        try:
            values = {name: texts[-1] for name, texts in parse_qs(query.decode("ascii"), max_num_fields=16).items()}
        except ValueError as error:
            raise HttpError(400, f"the query is invalid: {error}") from error
        top, invert = values.get("top", str(min(TOP, classes))), values.get("invert", "auto")
        if not (top.isascii() and top.isdecimal() and len(top) < 10 and 1 <= int(top) <= classes):
            raise HttpError(400, f"top: expected an integer from 1 to {classes}")
        if invert not in INVERT:
            raise HttpError(400, f"invert: expected one of {', '.join(INVERT)}")
        return cls(int(top), invert, values.get("seen", "0") not in ("0", ""))


@dataclass
class Part:
    """A part of a multipart body."""

    headers: bytearray = field(default_factory=bytearray)
    data: bytearray = field(default_factory=bytearray)


def image_file(request: Request) -> bytes:
    """Return the image file of a request: its body, or the first file of a multipart body. Raise HttpError."""
    kind, options = parse_options_header(request.header(b"content-type"))
    if kind != b"multipart/form-data":
        if not request.body:
            raise HttpError(400, "expected an image file as the body, or as a part of multipart/form-data")
        return request.body
    if b"boundary" not in options:
        raise HttpError(400, "Content-Type: multipart/form-data has no boundary")
    parts: list[Part] = []

    def begin_part() -> None:
        if len(parts) == MAX_PARTS:
            raise ValueError(f"it has more than {MAX_PARTS} parts")
        parts.append(Part())

    callbacks: dict[str, Any] = {
        "on_part_begin": begin_part,
        "on_header_field": lambda data, start, end: parts[-1].headers.extend(data[start:end]),
        "on_header_value": lambda data, start, end: parts[-1].headers.extend(data[start:end]),
        "on_part_data": lambda data, start, end: parts[-1].data.extend(data[start:end]),
    }
    try:
        parser = MultipartParser(options[b"boundary"], callbacks)  # type: ignore[arg-type]
        parser.write(request.body)
        parser.finalize()
    except (FormParserError, ValueError) as error:
        raise HttpError(400, f"the multipart body is invalid: {str(error)[:200]}") from error
    files = [part for part in parts if b"filename=" in part.headers.lower()]
    if not files:
        raise HttpError(400, "the multipart body contains no file")
    return bytes(files[0].data)


def decode_image(content: bytes, options: Options, expected: ImageFormat) -> np.ndarray:
    """Return an image file as an image of the training set. Raise HttpError if it is unreadable. Slow: in a thread."""
    try:
        return read_image(io.BytesIO(content), options.invert, expected, "image")
    except UnreadableImage as error:
        raise HttpError(400, re.sub(r" <_io\.\S+ object at \w+>", "", str(error))) from error


def answer(
    outputs: Mapping[str, np.ndarray], image: np.ndarray, options: Options, model: ServedModel
) -> dict[str, Any]:
    """Return the most probable classes of one image, in descending order."""
    probabilities = outputs["predictions"][0]
    order = np.argsort(-probabilities, kind="stable")[: options.top].tolist()
    classes = model.classes or list(map(str, range(len(probabilities))))
    top = [{"class": classes[i], "label": i, "probability": float(probabilities[i])} for i in order]
    return {"top": top, **({"seen": _png(image)} if options.seen else {})}


def _png(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image if image.ndim == 2 else image.transpose(1, 2, 0)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
