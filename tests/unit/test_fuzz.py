"""Whatever a user, a disk or an environment brings: an answer or a UserError of one line, and nothing else.

``make fuzz`` runs these for half an hour; the suite runs each for some seconds (``FUZZ`` multiplies the examples).
"""

import contextlib
import copy
import io
import json
import os
import random
import string
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from distlenet import train
from distlenet.checkpoint.format import from_bytes, load_checkpoint, to_bytes
from distlenet.config.fields import FIELDS
from distlenet.config.loading import load_config
from distlenet.data import idx
from distlenet.distributed.environment import DistributedEnvironment, read_environment
from distlenet.preflight.rank_info import collect_rank_info
from distlenet.report.runs import read_run
from distlenet.serving.image_files import UnreadableImage, read_image
from distlenet.serving.predictor import Predictor
from distlenet.tracking.history import read_records
from distlenet.utils.errors import Preempted, UserError

pytestmark = pytest.mark.unit

TIMES = int(os.environ.get("FUZZ", "1"))


def examples(number: int) -> settings:
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=number * TIMES,
        deadline=None,
        suppress_health_check=quiet,
        phases=[Phase.explicit, Phase.generate],  # to shrink what fails takes minutes, where each try is a training
        derandomize=TIMES == 1,  # the suite tries the same each time; ``make fuzz`` looks for more
        database=None,
    )


@contextlib.contextmanager
def answers():
    """Let a UserError pass that is fit to be printed as one line; anything else fails the test."""
    try:
        yield
    except UserError as error:
        text = " ".join(str(error).split())
        assert text
        assert len(text) < 2000
        assert "Traceback" not in text
    except Preempted:
        pass


# --- settings

YAML = """null true -1 0 1e400 nan .inf [1 {a:b} ${seed} ${oc.env:HOME} ??? !!python/object 0x1F 1_000 &a é * ~ --- @"""
texts = st.text(max_size=20) | st.sampled_from([*YAML.split(), "", "\x00", "\t", "{a: b}"])
numbers = st.integers(-(10**20), 10**20).map(str) | st.floats().map(str)
keys = (
    st.sampled_from([*FIELDS])
    | st.sampled_from([*FIELDS]).map(lambda key: key[:-1])
    | st.sampled_from(["train", "run", "", ".", "a.b.c", "train.epochs.x", "train[0]"])
    | st.text(string.printable, max_size=12)
)


@examples(1500)
@given(st.lists(st.tuples(keys, texts | numbers), max_size=4))
def test_overrides(pairs):
    with answers():
        config = load_config([], [f"{key}={value}" for key, value in pairs])
        load_config([], [], base=config.to_dict())  # what was accepted is accepted again


@examples(150)
@given(st.binary(max_size=200) | st.lists(st.tuples(keys, texts | numbers), max_size=3))
def test_config_files(tmp_path, content):
    path = tmp_path / "config.yaml"
    text = (
        content if isinstance(content, bytes) else "\n".join(f"{k}: {v}" for k, v in content).encode(errors="replace")
    )
    path.write_bytes(text)
    with answers():
        load_config([str(path)])


def values_of(key: str) -> st.SearchStrategy:
    """Values of a setting that its own check accepts, its ends among them."""
    field = FIELDS[key]
    if key in SIZES:
        return st.sampled_from(SIZES[key])
    low, above, below = (field.metadata[name] for name in ("ge", "gt", "lt"))
    if field.type in (int, int | None):
        top = below or 2**62
        ends = [str(v) for v in (low or 0, (low or 0) + 1, 2, 7, 64, top - 1)]
        return st.sampled_from(ends + ["null"] * (field.type == int | None))
    if field.type in (float, float | None):
        ends = [low if low is not None else above, 1e-30, 1e-3, 0.5, 0.999, 30.0, 1e9, 1e300]
        return st.sampled_from([v for v in ends if (above is None or v > above) and (below is None or v < below)]).map(
            str
        )
    if field.type is bool:
        return st.sampled_from(["true", "false"])
    return st.sampled_from(getattr(field.type, "__args__", ("x",))).map(str)


SIZES = {  # what would only take the machine's time, or write elsewhere
    "data.num_workers": ["0", "0", "1"],
    "data.name": ["digits"],
    "data.root": ["none"],
    "device": ["cpu"],
    "distributed.threads": ["null", "1", "2"],
    "distributed.step_timeout_s": ["30"],  # whose end is the process's
    "distributed.init_timeout_s": ["30"],
    "train.max_steps": ["1", "2"],
    "wandb.mode": ["disabled"],
    "checkpoint.resume": ["auto", "never"],
    "checkpoint.allow_changed": ["[]"],
    "checkpoint.path": ["null"],
    "run.console": ["auto", "tutorial"],
    "run.dir": ["runs"],
    "wandb.tags": ["[]"],
    "tracking.tensorboard": ["false"],
}
FIXED = {key: SIZES[key][0] for key in ("data.name", "device", "data.root", "wandb.mode")} | {"train.max_steps": "2"}


@examples(60)
@given(st.dictionaries(st.sampled_from([*FIELDS]), st.none(), max_size=5).flatmap(
    lambda chosen: st.fixed_dictionaries({key: values_of(key) for key in chosen})
))  # fmt: skip
def test_any_settings_train_or_say_why_not(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("fuzz")
    beside = set(folder.parent.iterdir())
    with contextlib.chdir(folder), answers():
        train.train(load_config([], [f"{key}={value}" for key, value in {**FIXED, **values}.items()]))
    assert {path.name for path in folder.iterdir()} <= {"runs"}
    assert set(folder.parent.iterdir()) == beside


# --- files


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    words = [f"{key}={value}" for key, value in FIXED.items()]
    train.train(load_config([], [*words, f"run.dir={folder}", "run.name=run"]))
    return folder / "run/checkpoints/step-00000002.pt"


seeds = st.integers(0, 2**32)


def damaged(content: bytes, random_: random.Random) -> bytes:
    """Flip, cut, repeat or replace some bytes."""
    data = bytearray(content)
    for _ in range(random_.randint(1, 8)):
        at, size = random_.randrange(len(data) + 1), random_.choice((1, 1, 2, 8, 100))
        kind = random_.randrange(4)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << random_.randrange(8)
        elif kind == 1:
            data[at : at + size] = random_.randbytes(size)
        elif kind == 2:
            del data[at : at + random_.choice((size, 10**6))]
        else:
            data[at:at] = data[max(0, at - size) : at]
    return bytes(data)


@examples(100)
@given(seeds, st.booleans())
def test_checkpoint_bytes(tmp_path, checkpoint, seed, signed):
    random_ = random.Random(seed)
    content = damaged(checkpoint.read_bytes()[: -71 if signed else None], random_)
    path = tmp_path / "damaged.pt"
    if signed:  # so that what is behind the checksum is reached
        from distlenet.checkpoint.format import _comment

        content = content[:-2] + (71).to_bytes(2, "little")
        content += _comment(content)
    path.write_bytes(content)
    with answers():
        load_checkpoint(path)


PLAIN = [None, True, -1, 0, 1, 10**30, float("nan"), float("inf"), "text", "", [], {}, [1], {"a": 1}, (1, 2), b"bytes"]
TENSORS = [torch.zeros(0), torch.full((3,), float("nan")), torch.zeros(3, dtype=torch.int64), torch.zeros(1).cfloat()]
odd = st.sampled_from([*PLAIN, *TENSORS])


def places(value, path=()):
    """List the paths to all values inside nested dicts and lists."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


@examples(60)
@given(st.data())
def test_checkpoint_states(tmp_path_factory, checkpoint, data):
    """A file that is whole, and in which something is not what it was."""
    state = copy.deepcopy(from_bytes(checkpoint.read_bytes()))
    for _ in range(data.draw(st.integers(1, 2))):
        *way, last = data.draw(st.sampled_from(places(state)))
        inside = state
        for key in way:
            inside = inside[key]
        if data.draw(st.booleans()) and isinstance(inside, dict):
            del inside[last]
        else:
            inside[last] = copy.deepcopy(data.draw(odd))  # else it may come to hold itself
    folder = tmp_path_factory.mktemp("state")
    path = folder / "odd.pt"
    path.write_bytes(to_bytes(state))
    words = [f"{key}={value}" for key, value in FIXED.items()] + [f"checkpoint.resume={path}", "run.name=run"]
    with answers():
        allow = "checkpoint.allow_changed=[train.max_steps,optim.lr]"
        train.train(load_config([], [*words, f"run.dir={folder}", "train.max_steps=3", allow]))
    assert {found.name for found in folder.iterdir()} <= {"odd.pt", "run"}


@examples(100)
@given(st.data())
def test_checkpoint_states_of_a_prediction(tmp_path, checkpoint, data):
    state = copy.deepcopy(from_bytes(checkpoint.read_bytes()))
    *way, last = data.draw(st.sampled_from([place for place in places(state) if place[0] in READ_BY_PREDICT]))
    inside = state
    for key in way:
        inside = inside[key]
    inside[last] = copy.deepcopy(data.draw(odd))
    path = tmp_path / "odd.pt"
    path.write_bytes(to_bytes(state))
    with answers():
        probabilities = Predictor(path)(torch.zeros(1, 28, 28, dtype=torch.uint8))
        assert probabilities.isfinite().all()
        assert probabilities.shape == (1, 10)


READ_BY_PREDICT = ("input", "classes", "config", "model")


@examples(300)
@given(st.binary(max_size=64) | st.tuples(st.lists(st.integers(0, 2**32 - 1), max_size=5), st.binary(max_size=40)))
def test_idx_bytes(content):
    if isinstance(content, tuple):
        content = idx.header(tuple(content[0])) + content[1]
    with contextlib.suppress(ValueError):
        parsed = idx.parse(torch.frombuffer(bytearray(content) or bytearray(1), dtype=torch.uint8))
        assert parsed.numel() <= len(content)


@examples(40)
@given(seeds, st.booleans())
def test_idx_files(tmp_path, seed, packed):
    random_ = random.Random(seed)
    from idx_files import small_set, write_set

    folder = tmp_path / f"{seed}-{packed}"
    write_set(folder, small_set(), packed=packed)
    path = random_.choice(sorted(folder.iterdir()))
    path.write_bytes(damaged(path.read_bytes(), random_))
    with answers():
        from distlenet.data.sources import open_data

        with open_data(load_config([], [f"data.root={folder}"]).data):
            pass


PICTURES = [(name, mode) for name in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM") for mode in ("L", "RGB", "P")]


@examples(250)
@given(seeds, st.sampled_from(PICTURES), st.sampled_from(["auto", "yes", "no"]))
def test_image_bytes(tmp_path, seed, kind, invert):
    random_ = random.Random(seed)
    form, mode = kind
    file = io.BytesIO()
    try:
        Image.new(mode, (random_.randint(1, 40), random_.randint(1, 40))).save(file, form)
    except OSError:  # a mode that the format does not have
        return
    path = tmp_path / "image"
    path.write_bytes(damaged(file.getvalue(), random_))
    with contextlib.suppress(UnreadableImage):
        assert read_image(path, invert, 28).shape == (28, 28)


lines = st.binary(max_size=60) | st.sampled_from(
    [b"null", b"[]", b"1", b'{"step": 1}', b'{"step": "x", "split": "train"}', b'{"step": 1, "split": []}', b"{" * 5000]
)


@examples(150)
@given(st.lists(lines, max_size=5))
def test_history_lines(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(content))
    with answers():
        list(read_records(path))


@examples(25)
@given(st.lists(lines, max_size=4), st.sampled_from(["starts.jsonl", "metrics.jsonl", "summary.json", "config.yaml"]))
def test_a_run_folder_with_odd_files(tmp_path_factory, content, name):
    folder = tmp_path_factory.mktemp("folder")
    (folder / "run").mkdir()
    (folder / "run" / name).write_bytes(b"\n".join(content))
    words = [f"{key}={value}" for key, value in FIXED.items()] + [f"run.dir={folder}", "run.name=run"]
    with answers():
        train.train(load_config([], words))


@examples(60)
@given(st.lists(lines, max_size=4), st.sampled_from(["starts.jsonl", "metrics.jsonl", "summary.json", "config.yaml"]))
def test_a_report_of_odd_files(tmp_path_factory, checkpoint, content, name):
    run = tmp_path_factory.mktemp("report") / "run"
    run.mkdir()
    for file in checkpoint.parents[1].iterdir():
        if file.is_file():
            (run / file.name).write_bytes(file.read_bytes())
    (run / name).write_bytes(b"\n".join(content))
    with answers():
        assert read_run(run).folder == run


# --- environment

TORCHRUN = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT TORCHELASTIC_USE_AGENT_STORE"
SLURM = (
    "PROCID LOCALID NODEID STEP_NUM_TASKS STEP_TASKS_PER_NODE STEP_NODELIST JOB_ID STEP_ID GPUS_PER_TASK DISTRIBUTION"
)
NAMES = [*TORCHRUN.split(), *(f"SLURM_{name}" for name in SLURM.split())]
PLACES = """0 1 2 -1 1e3 99999 2(x2) 2(x999999999) n[1-3] n[ (x9) True ²"""
values = st.text(max_size=8) | st.sampled_from(PLACES.split())


@examples(1500)
@given(st.dictionaries(st.sampled_from(NAMES), values))
def test_places(environ):
    with answers():
        env = read_environment(environ)
        assert 0 <= env.rank < env.world_size
        assert 0 <= env.local_rank < env.local_world_size


OTHERS = """OMP_NUM_THREADS TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS SLURM_RESTART_COUNT SLURM_JOB_ID
WANDB_MODE COLUMNS LINES TERM NO_COLOR HOME TMPDIR GLOO_SOCKET_IFNAME TORCH_DISTRIBUTED_DEBUG"""


@examples(40)
@given(
    st.dictionaries(
        st.sampled_from(OTHERS.split()), values.filter(lambda text: "\0" not in text and text.isprintable())
    )
)
def test_environments(tmp_path_factory, environ):
    folder = tmp_path_factory.mktemp("environment")
    with pytest.MonkeyPatch.context() as patch, answers():
        for name, value in environ.items():
            patch.setenv(name, value)
        assert collect_rank_info(load_config([], []), DistributedEnvironment()).threads >= 1
        words = [f"{key}={value}" for key, value in FIXED.items()] + [f"run.dir={folder}", "run.name=run"]
        train.train(load_config([], words))


def test_json_of_a_deep_line_is_no_crash(tmp_path):
    """Found by hand: Python's reader of JSON gives up at some depth with another error."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(UserError, match="line 1 is no record"):
        list(read_records(path))
    assert json.loads("[]") == []
