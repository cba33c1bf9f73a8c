"""The prediction page in Chromium, with a server and without: it answers as ``distlenet predict`` does."""

import base64
import io
import json
import os
import random
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from browser import NODE_MODULES, open_browser, static_host_of
from conftest import REPO
from forked import run_python
from PIL import Image
from serve_models import serving

from distlenet.config.loading import load_config
from distlenet.data.sources import load_data
from distlenet.images.image_files import read_image
from distlenet.images.image_format import ImageFormat
from distlenet.inference.predictor import Predictor
from distlenet.predict import top_classes

pytestmark = pytest.mark.browser

RUNTIME = NODE_MODULES / "onnxruntime-web"
PHONE, DESKTOP = (390, 844), (1400, 900)
CONTROL, SHIFT = 2, 8  # modifiers of key events
BY_MOUSE, BY_TOUCH = "mouse", "touch"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.send("Page.setInterceptFileChooserDialog", enabled=True)
        yield browser


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A short training on the bundled digits, in ``run``, and its export for the browser, in ``model``."""
    if not RUNTIME.is_dir() and os.environ.get("DISTLENET_BROWSER") != "required":
        pytest.skip("no onnxruntime-web: make test-browser installs it")
    directory = tmp_path_factory.mktemp("page")
    settings = ("data.name=digits", "train.epochs=4", "optim.lr=0.05", f"run.dir={directory}", "run.name=run")
    run_python("-m", "distlenet.train", *settings).succeeded()
    words = ("--to", "web", "--onnxruntime-web", RUNTIME, "--name", "digits", "--out", directory / "model")
    run_python("-m", "distlenet.export", directory / "run", *words).succeeded()
    return directory


@pytest.fixture(scope="module")
def static_host(directory):
    """The address of a static host of the exported directory."""
    with static_host_of(directory / "model/1/web") as address:
        yield f"{address}/"


@pytest.fixture(scope="module")
def server(directory):
    """The address of a server of the exported model."""
    with serving(directory / "model") as server:
        yield f"{server.url}/"


@pytest.fixture(scope="module", params=["static_host", "server"])
def address(request):
    """The address of the page: with the network in the browser, and with a server."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def predictor(directory):
    return Predictor(directory / "run")


@pytest.fixture(scope="module")
def photo(directory):
    """A test image as someone could photograph it: dark on light, in color, large, wider than high."""
    (digit,) = load_data(load_config([], ["data.name=digits"]).data).test.images[:1].numpy()
    image = Image.new("RGB", (640, 480), (244, 240, 226))
    ink = Image.fromarray(digit).resize((400, 400), Image.Resampling.BICUBIC).point(lambda value: 2 * value)
    image.paste((30, 34, 80), (120, 40), ink)
    image.save(directory / "photo.png")
    return directory / "photo.png"


def check_answer(answer: dict, predictor: Predictor, file: Path, invert: str = "auto", count: int = 5) -> None:
    """Check that the page shows the ``count`` most probable classes, as ``distlenet predict`` answers for a file."""
    image = torch.from_numpy(read_image(file, invert, predictor.images, file))
    top = top_classes(predictor(image[None])[0], predictor.classes, count)
    assert [name for name, _ in answer["top"]] == [each["class"] for each in top]
    assert answer["text"] == ", ".join(answer["top"][0])
    for (_, text), each in zip(answer["top"], top, strict=True):
        # Rounding to a decimal place moves a percentage by 0.05 at most; ONNX Runtime and PyTorch differ by 1e-4.
        assert float(text.removesuffix(" %")) == pytest.approx(100 * each["probability"], abs=0.0502)


READY = """
new Promise((resolve, reject) => {
  const end = performance.now() + 120000;
  const check = () => {
    const [file, error] = ["file", "error"].map(id => document.getElementById(id));
    if (performance.now() > end) reject(new Error("not ready after 120 s"));
    else if (!error.hidden) reject(new Error(error.textContent));
    else if (file.disabled) setTimeout(check, 10);
    else resolve(true);
  };
  check();
})
"""

ANSWER = """
new Promise(resolve => {
  const element = id => document.getElementById(id), end = performance.now() + 120000;
  const check = () => {
    const rows = [...element("classes").children].map(row => [".name", ".value"].map(
      part => row.querySelector(part).textContent));
    if (performance.now() > end) resolve({error: "no answer after 120 s"});
    else if (element("answers").ariaBusy == "true") setTimeout(check, 10);
    else if (!element("token-form").hidden) resolve({token: element("error").textContent});
    else if (!element("error").hidden) resolve({error: element("error").textContent});
    else if (element("answer").textContent) resolve({top: rows, text: element("answer").textContent});
    else setTimeout(check, 10);
  };
  check();
})
"""


def open_page(browser, address, size):
    browser.send("Emulation.setTouchEmulationEnabled", enabled=size == PHONE)
    browser.open(address, *size)
    browser.evaluate(READY)


def forget(browser):
    """Remove the answer that is shown, so that the next one is new."""
    browser.evaluate("for (const id of ['answer', 'error']) document.getElementById(id).textContent = ''")
    browser.evaluate("document.getElementById('error').hidden = true")


def choose(browser, file, chooser="file"):
    element = browser.send("Runtime.evaluate", expression=f"document.getElementById('{chooser}')")["result"]
    browser.send("DOM.setFileInputFiles", files=[str(file)], objectId=element["objectId"])


def press(browser, key, code=0, modifiers=0, **more):
    for kind in ("keyDown", "keyUp"):
        browser.send(
            "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, modifiers=modifiers, **more
        )


def draw_seven(browser, pointer):
    """Draw a 7 with two lines, as a hand would, on the drawing area."""
    left, top, side = browser.evaluate(
        "(box => [box.left, box.top, box.width])(document.getElementById('drawing').getBoundingClientRect())"
    )
    for line in ([(0.25, 0.2), (0.5, 0.2), (0.75, 0.2), (0.6, 0.5), (0.45, 0.85)], [(0.4, 0.5), (0.7, 0.5)]):
        points = [(left + x * side, top + y * side) for x, y in line]
        for number, (x, y) in enumerate([*points, points[-1]]):
            phase = 0 if number == 0 else 2 if number == len(points) else 1
            if pointer == BY_TOUCH:
                kind = ("touchStart", "touchMove", "touchEnd")[phase]
                touches = [] if phase == 2 else [{"x": x, "y": y}]
                browser.send("Input.dispatchTouchEvent", type=kind, touchPoints=touches)
            else:
                kind = ("mousePressed", "mouseMoved", "mouseReleased")[phase]
                browser.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)


def save_drawing(browser, file):
    url = browser.evaluate("document.getElementById('drawing').toDataURL('image/png')")
    file.write_bytes(base64.b64decode(url.partition(",")[2]))


def check_page(browser, address, size, screenshot):
    """Check that nothing is too wide, that no other host received a request, and that the console is empty."""
    screenshot.write_bytes(browser.screenshot())
    assert browser.evaluate("document.documentElement.scrollWidth") <= size[0]
    sent = [event["params"] for event in browser.events if event.get("method") == "Network.requestWillBeSent"]
    urls = [request["request"]["url"] for request in sent]
    assert {urlsplit(url).netloc for url in urls if not url.startswith(("data:", "blob:"))} == {
        urlsplit(address).netloc
    }
    methods = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    assert [event for event in browser.events if event.get("method") in methods] == []


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_a_file_and_a_drawing_are_classified_as_by_predict(browser, address, predictor, photo, size, tmp_path):
    open_page(browser, address, size)
    choose(browser, photo, "camera" if size == PHONE else "file")
    check_answer(browser.evaluate(ANSWER), predictor, photo)
    seen = browser.evaluate("document.getElementById('seen').toDataURL('image/png')")
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(seen.partition(",")[2]))).convert("L"))
    assert np.array_equal(pixels, read_image(photo, "auto", predictor.images, photo))
    check_page(browser, address, size, tmp_path / "file.png")

    browser.evaluate("document.getElementById('mode-drawing').click()")
    forget(browser)
    draw_seven(browser, BY_TOUCH if size == PHONE else BY_MOUSE)
    answer = browser.evaluate(ANSWER)
    save_drawing(browser, tmp_path / "drawing.png")
    check_answer(answer, predictor, tmp_path / "drawing.png")
    assert answer["top"][0][0] == "7"
    check_page(browser, address, size, tmp_path / "drawn.png")


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_each_state_of_the_page_is_accessible(browser, server, photo, scheme, tmp_path):
    browser.prefer(scheme)
    open_page(browser, server, PHONE)
    assert browser.accessibility_problems() == []
    choose(browser, photo)
    assert "top" in browser.evaluate(ANSWER)
    assert browser.accessibility_problems() == []
    forget(browser)
    (tmp_path / "notes.png").write_text("no image")
    choose(browser, tmp_path / "notes.png")
    assert "error" in browser.evaluate(ANSWER)
    assert browser.accessibility_problems() == []
    browser.evaluate("document.getElementById('mode-drawing').click()")
    assert browser.accessibility_problems() == []


def test_the_keyboard_is_enough(browser, address, predictor, photo, tmp_path):
    open_page(browser, address, DESKTOP)
    focus = "document.activeElement.id"
    press(browser, "Tab", 9)
    assert browser.evaluate(focus) == "mode-file"
    press(browser, "Tab", 9)
    assert browser.evaluate(focus) == "file"
    outline = "getComputedStyle(document.activeElement.parentElement).outlineWidth"
    assert browser.evaluate(outline) == "3px"  # the label that is shown in place of the input
    browser.events.clear()
    press(browser, " ", 32, text=" ")
    while not (opened := [event for event in browser.events if event["method"] == "Page.fileChooserOpened"]):
        browser.evaluate("1")
    browser.send("DOM.setFileInputFiles", files=[str(photo)], backendNodeId=opened[0]["params"]["backendNodeId"])
    check_answer(browser.evaluate(ANSWER), predictor, photo)
    press(browser, "Tab", 9, SHIFT)
    press(browser, "ArrowRight", 39)
    assert browser.evaluate(focus) == "mode-drawing"
    press(browser, "Tab", 9)
    assert browser.evaluate(focus) == "drawing"
    forget(browser)
    browser.send("Input.dispatchKeyEvent", type="keyDown", key="Shift", windowsVirtualKeyCode=16, modifiers=SHIFT)
    for _ in range(10):
        press(browser, "ArrowUp", 38, SHIFT)
    browser.send("Input.dispatchKeyEvent", type="keyUp", key="Shift", windowsVirtualKeyCode=16)
    answer = browser.evaluate(ANSWER)
    save_drawing(browser, tmp_path / "drawing.png")
    check_answer(answer, predictor, tmp_path / "drawing.png")
    press(browser, "Delete", 46)
    assert browser.evaluate("document.getElementById('answer').textContent") == ""


BYTES = 'Uint8Array.from(atob("%s"), character => character.charCodeAt(0))'
COPY = f"navigator.clipboard.write([new ClipboardItem({{'image/png': new Blob([{BYTES}], {{type: 'image/png'}})}})])"
DROP = f"""{{
const data = new DataTransfer();
data.items.add(new File([{BYTES}], "image.png", {{type: "image/png"}}));
document.body.dispatchEvent(new DragEvent("drop", {{dataTransfer: data, bubbles: true, cancelable: true}}));
}}"""


def test_a_pasted_image_is_classified(browser, address, predictor, photo):
    browser.send("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    open_page(browser, address, DESKTOP)
    browser.evaluate(COPY % base64.b64encode(photo.read_bytes()).decode())
    press(browser, "v", 86, CONTROL, commands=["paste"])
    check_answer(browser.evaluate(ANSWER), predictor, photo)


def test_a_dropped_image_is_classified(browser, static_host, predictor, photo):
    open_page(browser, static_host, DESKTOP)
    browser.evaluate(DROP % base64.b64encode(photo.read_bytes()).decode())
    check_answer(browser.evaluate(ANSWER), predictor, photo)


def test_the_setting_inverts(browser, server, predictor, photo):
    open_page(browser, server, DESKTOP)
    choose(browser, photo)
    first = browser.evaluate(ANSWER)
    forget(browser)
    browser.evaluate(
        "{const e = document.getElementById('invert'); e.value = 'no'; e.dispatchEvent(new Event('change'))}"
    )
    second = browser.evaluate(ANSWER)
    check_answer(second, predictor, photo, "no")
    assert second["top"] != first["top"]


def test_errors_are_sentences(browser, address, tmp_path):
    open_page(browser, address, PHONE)
    (tmp_path / "notes.png").write_text("no image")
    choose(browser, tmp_path / "notes.png")
    error = browser.evaluate(ANSWER)["error"]
    assert "image" in error
    forget(browser)
    Image.new("L", (20_000, 1)).save(tmp_path / "wide.png")
    choose(browser, tmp_path / "wide.png")
    error = browser.evaluate(ANSWER)["error"]
    assert "20000 × 1 pixels" in error


def test_a_server_can_ask_for_a_token_and_can_be_gone(browser, directory, predictor, photo, tmp_path):
    (tmp_path / "token").write_text("s3cret")
    with serving(directory / "model", "--token-file", tmp_path / "token") as server:
        open_page(browser, server.url, PHONE)
        choose(browser, photo)
        assert browser.evaluate(ANSWER) == {"token": ""}
        assert browser.evaluate("document.activeElement.id") == "token"
        assert browser.accessibility_problems() == []
        browser.send("Input.insertText", text="wrong")
        press(browser, "Enter", 13, text="\r")
        assert browser.evaluate(ANSWER) == {"token": "The server does not accept this token."}
        browser.send("Input.insertText", text="s3cret")
        press(browser, "Enter", 13, text="\r")
        check_answer(browser.evaluate(ANSWER), predictor, photo, count=3)  # the page does not know how many there are
        assert server.stop()[0] == 0
    forget(browser)
    choose(browser, photo)
    error = browser.evaluate(ANSWER)["error"]
    assert error == "The server does not answer. Check that it runs, and give the image again."


FILES = [("L", "PNG"), ("RGB", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("1", "PNG"), ("P", "PNG"), ("P", "GIF")]
FILES += [("L", "JPEG"), ("RGB", "JPEG"), ("CMYK", "JPEG"), ("RGB", "BMP"), ("RGB", "WEBP"), ("RGBA", "WEBP")]
READ = """
Promise.all(["image_decoding.js", "image_reading.js"].map(name => import(new URL(name, document.baseURI)))).then(
  ([{ decodeFile, pixelsOf }, { readImage, toPlanes }]) => Promise.all(%s.map(async ({ file, invert, format }) => {
    const blob = new Blob([Uint8Array.from(atob(file), character => character.charCodeAt(0))]);
    const planes = toPlanes(readImage(pixelsOf(await decodeFile(blob)), invert, format));
    return btoa(String.fromCharCode(...planes));
  })))
"""


def random_file(generator: random.Random, mode: str, kind: str) -> bytes:
    """Return an image file of any proportions; JPEG files have an EXIF orientation."""
    width, height = (generator.choice([generator.randint(1, 9), generator.randint(10, 60), 28]) for _ in range(2))
    pixels = np.frombuffer(generator.randbytes(width * height * 4), np.uint8).reshape(height, width, 4)
    if generator.random() < 0.5:  # large contrasts: bicubic results below 0 and above 255
        pixels = (pixels > generator.randint(50, 250)).astype(np.uint8) * 255
    if "A" in mode:  # light or dark, not between: there, the browser's rounding could select the other background
        pixels = np.dstack([pixels[..., :3] // 2 + generator.choice([0, 127]), pixels[..., 3:]])
    exif = Image.Exif()
    exif[0x112] = generator.randint(1, 8)
    file = io.BytesIO()
    options = {"exif": exif} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def random_format(generator: random.Random) -> ImageFormat:
    """Return the format of a network's images."""
    channels, size = generator.choice([1, 3]), generator.choice([(28, 28), (32, 32), (20, 45), (45, 20)])
    statistics = ((0.0,) * channels, (1.0,) * channels, 0.0, 255.0)
    return ImageFormat(channels, size, generator.random() < 0.3, *statistics, generator.random() < 0.5)


def read_in_browser(browser, cases: list[tuple[bytes, str, ImageFormat]]) -> list[bytes]:
    """Return what the page's modules read of files, with their settings of inversion, for networks."""
    texts = [
        {"file": base64.b64encode(file).decode(), "invert": invert, "format": images.to_dict()}
        for file, invert, images in cases
    ]
    return [base64.b64decode(text) for text in browser.evaluate(READ % json.dumps(texts))]


def test_files_are_read_to_the_byte_as_by_predict(browser, static_host):
    generator = random.Random(0)
    kinds = [kind for kind in FILES for _ in range(10)]
    files = [random_file(generator, *kind) for kind in kinds]
    cases = [(file, generator.choice(["auto", "yes", "no"]), random_format(generator)) for file in files]
    open_page(browser, static_host, DESKTOP)
    for kind, case, result in zip(kinds, cases, read_in_browser(browser, cases), strict=True):
        file, invert, images = case
        assert result == read_image(io.BytesIO(file), invert, images, "image").tobytes(), (kind, invert, images)


def test_a_png_of_16_bits_differs_by_a_level_at_most(browser, static_host):
    """The browser rounds to 8 bits, ``distlenet.images`` cuts."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 65536, (28, 28), dtype=np.uint16)).save(file, "PNG")
    images = ImageFormat(1, (28, 28), False, (0.0,), (1.0,), 0.0, 255.0, True)
    open_page(browser, static_host, DESKTOP)
    (result,) = read_in_browser(browser, [(file.getvalue(), "no", images)])
    wanted = read_image(file, "no", images, "image").ravel()
    assert np.abs(np.frombuffer(result, np.uint8).astype(int) - wanted).max() == 1


def test_a_network_without_class_names_shows_the_labels(browser, directory, photo, tmp_path):
    web = shutil.copytree(directory / "model/1/web", tmp_path / "web")
    file = web / json.loads((web / "page.json").read_text())["metadata"]
    file.write_text(json.dumps({**json.loads(file.read_text()), "classes": None}))
    with static_host_of(web) as address:
        open_page(browser, address, DESKTOP)
        choose(browser, photo)
        answer = browser.evaluate(ANSWER)
    assert len(answer.get("top", [])) == 3, answer


def test_a_line_by_keyboard_ends_when_the_focus_moves(browser, static_host, predictor, tmp_path):
    open_page(browser, static_host, DESKTOP)
    browser.evaluate("document.getElementById('mode-drawing').click()")
    browser.evaluate("document.getElementById('drawing').focus()")
    browser.send("Input.dispatchKeyEvent", type="keyDown", key="Shift", windowsVirtualKeyCode=16, modifiers=SHIFT)
    press(browser, "ArrowUp", 38, SHIFT)
    press(browser, "Tab", 9, SHIFT)
    browser.send("Input.dispatchKeyEvent", type="keyUp", key="Shift", windowsVirtualKeyCode=16)
    answer = browser.evaluate(ANSWER)
    save_drawing(browser, tmp_path / "drawing.png")
    check_answer(answer, predictor, tmp_path / "drawing.png")


SLOW_DRAWING = """{
const toBlob = HTMLCanvasElement.prototype.toBlob;
HTMLCanvasElement.prototype.toBlob = function (use, kind) {
  window.finishDrawing = () => new Promise(resolve =>
    toBlob.call(this, blob => { use(blob); setTimeout(resolve); }, kind));
};
}"""


def test_a_drawing_that_a_file_has_superseded_is_forgotten(browser, static_host, predictor, photo):
    open_page(browser, static_host, DESKTOP)
    browser.evaluate(SLOW_DRAWING)
    browser.evaluate("document.getElementById('mode-drawing').click()")
    draw_seven(browser, BY_MOUSE)
    choose(browser, photo)
    check_answer(browser.evaluate(ANSWER), predictor, photo)
    browser.evaluate("finishDrawing()")
    forget(browser)
    browser.evaluate(
        "{const e = document.getElementById('invert'); e.value = 'no'; e.dispatchEvent(new Event('change'))}"
    )
    check_answer(browser.evaluate(ANSWER), predictor, photo, "no")


def test_a_file_with_the_name_of_a_drawing_is_not_cleared(browser, static_host, predictor, photo, tmp_path):
    open_page(browser, static_host, DESKTOP)
    choose(browser, shutil.copy(photo, tmp_path / "drawing.png"))
    browser.evaluate(ANSWER)
    browser.evaluate("document.getElementById('clear').click()")
    check_answer(browser.evaluate(ANSWER), predictor, photo)


LOADED = """
new Promise(resolve => {
  const check = () => {
    const text = document.querySelector("[role=status]")?.textContent ?? "no status";
    if (text.startsWith("Loading")) setTimeout(check, 10);
    else resolve(text);
  };
  check();
})
"""


def test_the_page_of_the_paths_shows_the_status_of_a_failure(browser):
    with static_host_of(REPO / "distlenet/serve") as address:
        browser.open(f"{address}/docs.html", *DESKTOP)
        text = browser.evaluate(LOADED)
    assert text == "openapi.json cannot be read: status 404"
