import base64
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import run_python
from PIL import Image

from distlenet.checkpoint.archive import to_bytes
from distlenet.checkpoint.format import load_checkpoint
from distlenet.checkpoint.store import find_checkpoint
from distlenet.images.decoding import MAX_PIXELS, UnreadableImage, open_image
from distlenet.images.image_files import find_image_files, read_image
from distlenet.images.image_format import ImageFormat
from distlenet.inference.predictor import Predictor
from distlenet.utils.errors import UserError

pytestmark = [pytest.mark.unit, pytest.mark.slow]


GREY_28 = ImageFormat(1, (28, 28), False, (70.0,), (80.0,), 0.0, 255.0, True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short training on the bundled digits, and the 360 test images as PNG files."""
    from distlenet.config.loading import load_config
    from distlenet.data.sources import load_data

    directory = tmp_path_factory.mktemp("predict")
    settings = ("data.name=digits", "train.epochs=12", "optim.lr=0.05", f"run.dir={directory}", "run.name=run")
    run_python("-m", "distlenet.train", *settings).succeeded()
    (directory / "images").mkdir()
    for number, image in enumerate(load_data(load_config([], ["data.name=digits"]).data).test.images):
        Image.fromarray(image.numpy()).save(directory / f"images/{number:03d}.png")
    return directory


def predict(directory, *words):
    return run_python("-m", "distlenet.predict", f"checkpoint={directory}/run", *words)


def test_predictions_agree_with_evaluation(run):
    ended = predict(run, run / "images", "--json", "--top", "1").succeeded()
    answers = [json.loads(line)["top"][0] for line in ended.stdout.splitlines()]
    assert len(answers) == 360
    details = json.loads((run / "run/test.json").read_text())
    correct = sum(details["confusion"][c][c] for c in range(10))
    assert 300 < correct < 360
    counts = [sum(answer["label"] == label for answer in answers) for label in range(10)]
    assert counts == [sum(row[c] for row in details["confusion"]) for c in range(10)]
    assert details["mistakes"]
    for mistake in details["mistakes"]:
        answer = answers[mistake["index"]]
        assert answer["label"] == mistake["predicted"]
        # The evaluation computes the softmax in float64; the error of float32 is below 1e-6.
        assert answer["probability"] == pytest.approx(mistake["confidence"], abs=1e-6)


def test_variants_of_an_image_get_mostly_the_same_class(run, tmp_path):
    """For each of 5 kinds of variants, 9 of 10 variants agree with the original, over 60 digits."""
    predictor = Predictor(run / "run")
    images = []
    originals = [run / f"images/{number:03d}.png" for number in range(60)]
    for path in originals:
        images.append(read_image(path, "auto", predictor.images, path))
        for number, variant in enumerate(variants(Image.open(path))):
            target = tmp_path / f"{path.stem}-{number}.png"
            variant.save(target)
            images.append(read_image(target, "auto", predictor.images, target))
    labels = predictor(torch.from_numpy(np.stack(images))).argmax(1).view(60, -1)
    same = (labels[:, 1:] == labels[:, :1]).double().mean(0)
    assert len(same) == 5
    assert float(same.min()) >= 0.9, same


def variants(image):
    colour = Image.merge("RGB", [image.point(lambda v, f=f: int(v * f)) for f in (1.0, 0.9, 1.0)])
    clear = Image.new("RGBA", image.size, (0, 0, 0, 0))
    clear.putalpha(image)  # a drawing on a transparent background
    inverted = image.point(lambda v: 255 - v)
    return [image.resize((200, 200)), inverted, colour, clear, inverted.resize((57, 57))]


def test_image_like_the_training_set_is_unchanged(tmp_path):
    pixels = np.arange(28 * 28, dtype=np.uint8).reshape(28, 28) // 2
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert np.array_equal(read_image(tmp_path / "x.png", "auto", GREY_28, "x"), pixels)
    assert np.array_equal(read_image(tmp_path / "x.png", "yes", GREY_28, "x"), 255 - pixels)


def test_16_bits_are_scaled_to_8(tmp_path):
    Image.fromarray(np.full((28, 28), 25700, dtype=np.uint16)).save(tmp_path / "x.png")
    assert set(read_image(tmp_path / "x.png", "no", GREY_28, "x").flat) == {100}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, value):
    pixels = np.ones((28, 28), np.float32)
    pixels[3, 4] = value
    Image.fromarray(pixels).save(tmp_path / "x.tif")
    with pytest.raises(UnreadableImage, match="x: is not a readable image: contains values that are not finite"):
        read_image(tmp_path / "x.tif", "no", GREY_28, "x")


def test_unreadable_images_are_named_and_the_others_classified(run, tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    whole = (run / "images/000.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty").mkdir()
    good = run / "images/001.png"
    ended = predict(run, tmp_path / "text.png", tmp_path / "torn.png", good, tmp_path / "empty", tmp_path / "gone.png")
    assert ended.status == 2
    assert ended.stdout.startswith(f"{good}  ")
    (line,) = ended.stderr.splitlines()
    for name, reason in (
        ("text", "is not a readable image"),
        ("torn", "is not a readable image"),
        ("gone", "no such file"),
    ):
        assert f"{name}.png: {reason}" in line
    assert "empty: contains no image file" in line


def test_image_with_too_many_pixels_is_refused_before_decoding(tmp_path):
    Image.new("1", (MAX_PIXELS // 5000, 5001)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    with pytest.raises(UnreadableImage, match="pixels; expected at most 50,000,000, and 16,384 per side"):
        read_image(tmp_path / "bomb.png", "auto", GREY_28, tmp_path / "bomb.png")


def test_patterns_and_directories(tmp_path, monkeypatch):
    for name in ("b.png", "a.PNG", "notes.txt", "c.jpg"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert [p.name for p in find_image_files(".")] == ["a.PNG", "b.png", "c.jpg"]
    assert [p.name for p in find_image_files("*.png")] == ["b.png"]
    assert [p.name for p in find_image_files(str(tmp_path / "[ab].*"))] == ["a.PNG", "b.png"]
    (tmp_path / "x[1].png").touch()
    assert [p.name for p in find_image_files("x[1].png")] == ["x[1].png"]  # an existing file, not a pattern
    with pytest.raises(UnreadableImage, match=r"\*\.gif: contains no image file"):
        find_image_files("*.gif")


def test_annotated_figure(run, tmp_path):
    ended = predict(run, *sorted((run / "images").glob("00*.png")), "--save", tmp_path / "all.png").succeeded()
    assert f"Figure: {tmp_path}/all.png" in ended.stderr
    with Image.open(tmp_path / "all.png") as figure:
        assert figure.width > 500
    ended = predict(run, run / "images/000.png", "--save", tmp_path / "none/all.png")
    assert ended.status == 2
    assert "--save" in ended.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top", "0", "x.png"], "0: expected an integer, at least 1"),
        (["--top", "11", "x.png"], "expected an integer from 1 to 10"),
        ([], "expected checkpoint=RUN_OR_FILE once, and images"),
        (["--invert", "perhaps", "x.png"], "invalid choice"),
    ],
)
def test_usage_error_is_one_line(run, words, message):
    ended = predict(run, *words)
    assert ended.status == 2
    assert message in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_very_long_image_is_refused(tmp_path):
    Image.new("1", (16_385, 1)).save(tmp_path / "line.png")
    with pytest.raises(UnreadableImage, match="16385 × 1 pixels; expected at most 50,000,000, and 16,384 per side"):
        read_image(tmp_path / "line.png", "auto", GREY_28, tmp_path / "line.png")


def test_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UnreadableImage, match=r"pipe\.png: is not a regular file"):
        read_image(tmp_path / "pipe.png", "auto", GREY_28, tmp_path / "pipe.png")


def test_name_that_is_too_long_is_refused():
    with pytest.raises(UnreadableImage, match="File name too long"):
        find_image_files("x" * 300)


def test_transparent_background_contrasts_with_the_object(tmp_path):
    """A light object and a dark object on transparent ground both become light on dark."""
    for name, value in (("light", 230), ("dark", 20)):
        image = Image.new("RGBA", (28, 28), (value, value, value, 0))
        image.paste((value, value, value, 255), (10, 10, 18, 18))
        image.save(tmp_path / f"{name}.png")
        result = read_image(tmp_path / f"{name}.png", "auto", GREY_28, tmp_path / f"{name}.png")
        assert result[0, 0] == 0
        assert result[14, 14] > 200


def test_control_characters_in_names_are_escaped(run, tmp_path):
    image = tmp_path / "a\x1b[31m\nb.png"
    image.write_bytes((run / "images/000.png").read_bytes())
    (tmp_path / "c\x1b.png").write_text("not an image")
    odd = os.fsencode(tmp_path) + b"/\xff.png"
    Path(os.fsdecode(odd)).write_bytes(image.read_bytes())
    ended = predict(run, tmp_path, "--save", tmp_path / "page.png")
    assert ended.status == 2
    assert "\x1b" not in ended.stdout + ended.stderr
    assert "a\\x1b[31m\\nb.png  " in ended.stdout
    assert "\\udcff.png  " in ended.stdout
    assert len(ended.stdout.splitlines()) == 2
    assert (tmp_path / "page.png").stat().st_size > 1000
    ended = predict(run, image, "--save", tmp_path / "page.gif")
    assert ended.status == 2
    assert "page.gif: expected a name that ends in .png" in ended.stderr


def test_no_image_file_starts_a_program(tmp_path, monkeypatch):
    """Pillow runs Ghostscript for Encapsulated PostScript, whatever the suffix of the file."""
    called = tmp_path / "called"
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {called}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    image = tmp_path / "image.png"
    Image.new("L", (9, 9)).save(image, "EPS")
    with pytest.raises(UnreadableImage, match="is not a readable image"):
        read_image(image, "no", GREY_28, image)
    assert not called.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": [10**6, 5]}, "is invalid"),
        ({"size": [0, 5]}, "is invalid"),
        ({"std": [0.0]}, "is invalid"),
        ({"mean": [float("nan")]}, "is invalid"),
        ({"size": None}, "does not fit ImageClassification: .*NoneType"),
        ({"classes": [1] * 10}, "the class names are not a list of strings"),
        ({"classes": ["a"] * 11}, "has 11 class names, but the network has 10 outputs"),
        (None, "does not fit ImageClassification: it is a NoneType"),
        ({}, "does not fit ImageClassification: 'mean' is missing; give the task that was trained, or"),
        (torch.zeros(3), "does not fit ImageClassification: it is a Tensor"),
    ],
)
def test_checkpoint_with_an_invalid_task_state_is_refused(run, tmp_path, change, message):
    state = load_checkpoint(find_checkpoint(run / "run"))
    path = tmp_path / "odd.pt"
    task = {**state["task"], **change} if isinstance(change, dict) and change else change
    path.write_bytes(to_bytes({**state, "task": task}))
    with pytest.raises(UserError, match=message):
        Predictor(path)


def test_weights_that_are_not_finite_are_refused(run, tmp_path):
    state = load_checkpoint(find_checkpoint(run / "run"))
    path = tmp_path / "odd.pt"
    path.write_bytes(
        to_bytes({**state, "model": {k: torch.full_like(v, torch.nan) for k, v in state["model"].items()}})
    )
    with pytest.raises(UserError, match="outputs are not finite"):
        Predictor(path)


def test_damaged_exif_is_no_error():
    # A WebP image of 9×7 pixels. Pillow raises struct.error when it writes the EXIF of the turned image.
    file = (
        "UklGRmQAAABXRUJQVlA4WAoAAAAIAAAACAAABgAAVlA4IBgAAAAwAQCdASoJAAcAAUAmJaQAA3AB/v02aABFWElGJgAAAE1NACoAAAAIAAIBEgAD"
        "AAAAAQAGAAABAQACAAAAAngAAAAAAAAA"
    )
    assert open_image(io.BytesIO(base64.b64decode(file)), "photo").size in ((9, 7), (7, 9))


def test_an_image_whose_padding_would_need_much_memory_is_refused(tmp_path):
    Image.new("1", (16_384, 3_000)).save(tmp_path / "strip.png")
    with pytest.raises(UnreadableImage, match=r"strip\.png: is too long and narrow; crop it"):
        read_image(tmp_path / "strip.png", "no", GREY_28, "strip.png")
