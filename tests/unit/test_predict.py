import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_command
from PIL import Image

from distlenet.checkpoint.format import load_checkpoint, to_bytes
from distlenet.checkpoint.store import find_checkpoint
from distlenet.serving.image_files import MOST_PIXELS, Unreadable, find_pictures, read_picture
from distlenet.serving.predictor import Predictor
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short training on the bundled digits, and its 360 test images as PNG."""
    from distlenet.config.loading import load_config
    from distlenet.data.sources import load_data

    folder = tmp_path_factory.mktemp("predict")
    words = ("data.name=digits", "train.epochs=12", "optim.lr=0.05", f"run.dir={folder}", "run.name=run")
    run_command(sys.executable, "-m", "distlenet.train", *words).succeeded()
    (folder / "pictures").mkdir()
    for number, image in enumerate(load_data(load_config([], ["data.name=digits"]).data).test.images):
        Image.fromarray(image.numpy()).save(folder / f"pictures/{number:03d}.png")
    return folder


def predict(folder, *words):
    return run_command(sys.executable, "-m", "distlenet.predict", f"checkpoint={folder}/run", *words)


def test_it_agrees_with_evaluation_exactly(run):
    ended = predict(run, run / "pictures", "--json", "--top", "1").succeeded()
    answers = [json.loads(line)["top"][0] for line in ended.stdout.splitlines()]
    assert len(answers) == 360
    details = json.loads((run / "run/test.json").read_text())
    wrong = {m["index"]: m for m in details["mistakes"]}
    correct = sum(details["confusion"][c][c] for c in range(10))
    assert 300 < correct < 360
    counted = [0] * 10
    for found in answers:
        counted[found["label"]] += 1
    assert counted == [sum(row[c] for row in details["confusion"]) for c in range(10)]
    for index, mistake in wrong.items():
        assert answers[index]["label"] == mistake["predicted"]
        # Confidences are softmax of the same logits, once in float64: a float32 softmax errs by less than 1e-6.
        assert answers[index]["probability"] == pytest.approx(mistake["confidence"], abs=1e-6)


def test_variants_of_a_picture_are_mostly_taken_for_the_same(run, tmp_path):
    """Larger, inverted, coloured, transparent, inverted and larger: of each of 60 digits' variants 9 of 10 agree."""
    predictor = Predictor(run / "run")
    images = []
    originals = [run / f"pictures/{number:03d}.png" for number in range(60)]
    for path in originals:
        images.append(read_picture(path, "auto", predictor.size))
        for number, variant in enumerate(variants(Image.open(path))):
            target = tmp_path / f"{path.stem}-{number}.png"
            variant.save(target)
            images.append(read_picture(target, "auto", predictor.size))
    labels = predictor(torch.stack(images)).argmax(1).view(60, -1)
    same = (labels[:, 1:] == labels[:, :1]).double().mean(0)
    assert len(same) == 5
    assert float(same.min()) >= 0.9, same


def variants(image):
    colour = Image.merge("RGB", [image.point(lambda v, f=f: int(v * f)) for f in (1.0, 0.9, 1.0)])
    clear = Image.new("RGBA", image.size, (0, 0, 0, 0))
    clear.putalpha(image)  # ink on nothing
    inverted = image.point(lambda v: 255 - v)
    return [image.resize((200, 200)), inverted, colour, clear, inverted.resize((57, 57))]


def test_a_picture_of_the_training_sets_kind_comes_as_it_is(tmp_path):
    pixels = np.arange(28 * 28, dtype=np.uint8).reshape(28, 28) // 2
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert torch.equal(read_picture(tmp_path / "x.png", "auto", 28), torch.from_numpy(pixels))
    assert torch.equal(read_picture(tmp_path / "x.png", "yes", 28), 255 - torch.from_numpy(pixels))


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    Image.fromarray(np.full((28, 28), 25700, dtype=np.uint16)).save(tmp_path / "x.png")
    assert read_picture(tmp_path / "x.png", "no", 28).unique().tolist() == [100]


def test_what_is_no_picture_is_named_and_the_others_are_answered(run, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    whole = (run / "pictures/000.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty").mkdir()
    good = run / "pictures/001.png"
    ended = predict(run, tmp_path / "text.png", tmp_path / "torn.png", good, tmp_path / "empty", tmp_path / "gone.png")
    assert ended.status == 2
    assert ended.stdout.startswith(f"{good}  ")
    (line,) = ended.stderr.splitlines()
    for name, reason in (("text", "cannot be read"), ("torn", "cannot be read"), ("gone", "no such file")):
        assert f"{name}.png: {reason}" in line
    assert "empty: holds no picture" in line


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path):
    Image.new("1", (MOST_PIXELS // 5000, 5001)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    with pytest.raises(Unreadable, match="pixels; at most 50,000,000 are read, and 16,384 a side"):
        read_picture(tmp_path / "bomb.png", "auto", 28)


def test_patterns_and_folders(tmp_path, monkeypatch):
    for name in ("b.png", "a.PNG", "notes.txt", "c.jpg"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert [p.name for p in find_pictures(["."])] == ["a.PNG", "b.png", "c.jpg"]
    assert [p.name for p in find_pictures(["*.png", str(tmp_path / "[ab].*")])] == ["b.png", "a.PNG", "b.png"]
    (tmp_path / "x[1].png").touch()
    assert [p.name for p in find_pictures(["x[1].png"])] == ["x[1].png"]  # a file's own name is no pattern
    with pytest.raises(Unreadable, match=r"\*\.gif: holds no picture"):
        find_pictures(["*.gif"])


def test_an_annotated_picture(run, tmp_path):
    ended = predict(run, *sorted((run / "pictures").glob("00*.png")), "--save", tmp_path / "all.png").succeeded()
    assert f"Picture: {tmp_path}/all.png" in ended.stderr
    with Image.open(tmp_path / "all.png") as picture:
        assert picture.width > 500
    ended = predict(run, run / "pictures/000.png", "--save", tmp_path / "none/all.png")
    assert ended.status == 2
    assert "--save" in ended.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top", "0", "x.png"], "0: expected a whole number, at least 1"),
        (["--top", "11", "x.png"], "expected a whole number, 1 to 10"),
        ([], "expected checkpoint=RUN_OR_FILE once, and pictures"),
        (["--invert", "perhaps", "x.png"], "invalid choice"),
    ],
)
def test_mistakes_are_one_line(run, words, message):
    ended = predict(run, *words)
    assert ended.status == 2
    assert message in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_a_picture_too_long_to_be_made_square_is_refused(tmp_path):
    Image.new("1", (16_385, 1)).save(tmp_path / "line.png")
    with pytest.raises(Unreadable, match="16385 × 1 pixels; at most 50,000,000 are read, and 16,384 a side"):
        read_picture(tmp_path / "line.png", "auto", 28)


def test_a_pipe_is_no_picture(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(Unreadable, match=r"pipe\.png: is not a regular file"):
        read_picture(tmp_path / "pipe.png", "auto", 28)


def test_a_name_that_no_file_can_have_is_unreadable():
    with pytest.raises(Unreadable, match="File name too long"):
        find_pictures(["x" * 300])


def test_what_is_transparent_is_dark_behind_light_and_light_behind_dark(tmp_path):
    """A cut-out of a light thing, and one of a dark thing: each can be seen, as light on dark."""
    for name, value in (("light", 230), ("dark", 20)):
        picture = Image.new("RGBA", (28, 28), (value, value, value, 0))
        picture.paste((value, value, value, 255), (10, 10, 18, 18))
        picture.save(tmp_path / f"{name}.png")
        seen = read_picture(tmp_path / f"{name}.png", "auto", 28)
        assert seen[0, 0] == 0
        assert seen[14, 14] > 200


def test_names_are_shown_without_what_a_terminal_would_obey(run, tmp_path):
    picture = tmp_path / "a\x1b[31m\nb.png"
    picture.write_bytes((run / "pictures/000.png").read_bytes())
    (tmp_path / "c\x1b.png").write_text("no picture")
    odd = os.fsencode(tmp_path) + b"/\xff.png"
    Path(os.fsdecode(odd)).write_bytes(picture.read_bytes())
    ended = predict(run, tmp_path, "--save", tmp_path / "page.png")
    assert ended.status == 2
    assert "\x1b" not in ended.stdout + ended.stderr
    assert "a\\x1b[31m\\nb.png  " in ended.stdout
    assert "\\udcff.png  " in ended.stdout
    assert len(ended.stdout.splitlines()) == 2
    assert (tmp_path / "page.png").stat().st_size > 1000
    told = predict(run, picture, "--save", tmp_path / "page.gif")
    assert told.status == 2
    assert "page.gif: expected a name that ends in .png" in told.stderr


def test_no_file_starts_another_program(tmp_path, monkeypatch):
    """Pillow hands Encapsulated PostScript to Ghostscript, whatever the file is called."""
    called = tmp_path / "called"
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {called}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    picture = tmp_path / "picture.png"
    Image.new("L", (9, 9)).save(picture, "EPS")
    with pytest.raises(Unreadable, match="cannot be read as a picture"):
        read_picture(picture, "no", 28)
    assert not called.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": {"mean": 0.1, "std": 0.2, "size": 10**6}}, "what cannot be"),
        ({"input": {"mean": 0.1, "std": 0.2, "size": 0}}, "what cannot be"),
        ({"input": {"mean": 0.1, "std": 0.0, "size": 28}}, "what cannot be"),
        ({"input": {"mean": float("nan"), "std": 0.2, "size": 28}}, "what cannot be"),
        ({"input": {"mean": 0.1, "std": 0.2}}, "does not say what its images are like"),
        ({"input": None}, "does not say what its images are like"),
        ({"input": torch.zeros(3)}, "does not say what its images are like"),
        ({"classes": [1] * 10}, "what cannot be"),
        ({"classes": ["a"] * 11}, "names 11 classes, but its network gives 10 numbers"),
    ],
)
def test_a_checkpoint_that_says_what_cannot_be_is_refused(run, tmp_path, change, message):
    state = load_checkpoint(find_checkpoint(run / "run"))
    path = tmp_path / "odd.pt"
    path.write_bytes(to_bytes({**state, **change}))
    with pytest.raises(UserError, match=message):
        Predictor(path)


def test_weights_that_are_not_finite_predict_nothing(run, tmp_path):
    state = load_checkpoint(find_checkpoint(run / "run"))
    path = tmp_path / "odd.pt"
    path.write_bytes(
        to_bytes({**state, "model": {k: torch.full_like(v, torch.nan) for k, v in state["model"].items()}})
    )
    with pytest.raises(UserError, match="not all of them finite"):
        Predictor(path)
