"""Random settings, files and environments: the code returns a result or raises a UserError of one line.

``make fuzz`` runs these tests for half an hour, the suite for some seconds each (``FUZZ`` multiplies the examples).
"""

import contextlib
import copy
import hashlib
import io
import math
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
from distlenet.checkpoint.archive import from_bytes, to_bytes
from distlenet.checkpoint.format import load_checkpoint
from distlenet.config.fields import FIELDS
from distlenet.config.loading import load_config
from distlenet.data import idx
from distlenet.distributed.device import DeviceChoice
from distlenet.distributed.environment import DistributedEnvironment, read_environment
from distlenet.images.decoding import UnreadableImage
from distlenet.images.image_files import read_image
from distlenet.images.image_format import ImageFormat
from distlenet.inference.predictor import Predictor
from distlenet.preflight.rank_info import collect_rank_info
from distlenet.report.runs import read_run
from distlenet.tracking.history import read_records
from distlenet.utils.errors import Preempted, UserError

pytestmark = [pytest.mark.unit, pytest.mark.slow]

TIMES = int(os.environ.get("FUZZ", "1"))


def examples(number: int) -> settings:
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=number * TIMES,
        deadline=None,
        suppress_health_check=quiet,
        phases=[Phase.explicit, Phase.generate],  # shrinking takes minutes if each example is a training
        derandomize=TIMES == 1,  # the suite uses the same examples each time, ``make fuzz`` others
        database=None,
    )


@contextlib.contextmanager
def user_errors_allowed():
    """Suppress a UserError that can be printed as one line, and Preempted. Any other exception fails the test."""
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
    with user_errors_allowed():
        config = load_config([], [f"{key}={value}" for key, value in pairs])
        load_config([], [], base=config.to_dict())  # accepted settings are accepted again


@examples(150)
@given(st.binary(max_size=200) | st.lists(st.tuples(keys, texts | numbers), max_size=3))
def test_config_files(tmp_path, content):
    path = tmp_path / "config.yaml"
    text = (
        content if isinstance(content, bytes) else "\n".join(f"{k}: {v}" for k, v in content).encode(errors="replace")
    )
    path.write_bytes(text)
    with user_errors_allowed():
        load_config([str(path)])


def values_of(key: str) -> st.SearchStrategy:
    """Values that a setting accepts, including its bounds."""
    field = FIELDS[key]
    if key in CHEAP_VALUES:
        return st.sampled_from(CHEAP_VALUES[key])
    if field.choices or field.kind is str:
        return st.sampled_from(field.choices or ("x",))
    if field.kind is bool:
        return st.sampled_from(["true", "false"])
    if field.range:
        return st.sampled_from([str(field.default)])
    low, high = field.bounds.get("ge", 0), field.bounds.get("lt", 2**62 if field.kind is int else math.inf)
    high = field.bounds.get("le", high)
    if field.kind is int:
        values = [low, low + 1, 2, 7, 64, high - 1]
    else:
        values = [low, 1e-30, 1e-3, 0.5, 0.999, 30.0, 1e9, 1e300]
        values = [value for value in values if value < high and value > field.bounds.get("gt", -1)]
    return st.sampled_from([*map(str, values), *["null"] * field.nullable])


CHEAP_VALUES = {  # others would take long, or write outside the directory of the test
    "data.num_workers": ["0", "0", "1"],
    "data.name": ["digits"],
    "data.root": ["none"],
    "device": ["cpu"],
    "distributed.threads": ["null", "1", "2"],
    "distributed.step_timeout_s": ["30"],  # a timeout ends the process
    "distributed.init_timeout_s": ["30"],
    "train.max_steps": ["1", "2"],
    "train.profile_steps": ["null", "0:1", "1:2"],
    "wandb.mode": ["disabled"],
    "checkpoint.resume": ["auto", "never"],
    "checkpoint.allow_changed": ["[]"],
    "checkpoint.path": ["null"],
    "run.console": ["auto", "tutorial"],
    "run.dir": ["runs"],
    "wandb.tags": ["[]"],
    "tracking.tensorboard": ["false"],
    "tracking.prometheus": ["null"],
    "mlflow.enabled": ["false"],
}
FIXED = {
    "model.compile": "false",
    "data.name": "digits",
    "device": "cpu",
    "data.root": "none",
    "wandb.mode": "disabled",
    "train.max_steps": "2",
}


@examples(60)
@given(st.dictionaries(st.sampled_from([*FIELDS]), st.none(), max_size=5).flatmap(
    lambda chosen: st.fixed_dictionaries({key: values_of(key) for key in chosen})
))  # fmt: skip
def test_training_with_any_settings(tmp_path_factory, values):
    directory = tmp_path_factory.mktemp("fuzz")
    siblings = set(directory.parent.iterdir())
    with contextlib.chdir(directory), user_errors_allowed():
        train.train(load_config([], [f"{key}={value}" for key, value in {**FIXED, **values}.items()]))
    assert {path.name for path in directory.iterdir()} <= {"runs"}
    assert set(directory.parent.iterdir()) == siblings


# --- files


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    overrides = [f"{key}={value}" for key, value in FIXED.items()]
    train.train(load_config([], [*overrides, f"run.dir={directory}", "run.name=run"]))
    return directory / "run/checkpoints/step-00000002.pt"


seeds = st.integers(0, 2**32)


def damaged(content: bytes, random_: random.Random) -> bytes:
    """Flip, cut, repeat or replace some bytes."""
    data = bytearray(content)
    for _ in range(random_.randint(1, 8)):
        start, size = random_.randrange(len(data) + 1), random_.choice((1, 1, 2, 8, 100))
        kind = random_.randrange(4)
        if kind == 0 and start < len(data):
            data[start] ^= 1 << random_.randrange(8)
        elif kind == 1:
            data[start : start + size] = random_.randbytes(size)
        elif kind == 2:
            del data[start : start + random_.choice((size, 10**6))]
        else:
            data[start:start] = data[max(0, start - size) : start]
    return bytes(data)


@examples(100)
@given(seeds, st.booleans())
def test_checkpoint_bytes(tmp_path, checkpoint, seed, signed):
    random_ = random.Random(seed)
    content = damaged(checkpoint.read_bytes()[: -71 if signed else None], random_)
    path = tmp_path / "damaged.pt"
    if signed:  # a valid checksum lets the parser see the damage
        from distlenet.checkpoint.archive import _comment

        content = content[:-2] + (71).to_bytes(2, "little")
        content += _comment(hashlib.sha256(content))
    path.write_bytes(content)
    with user_errors_allowed():
        load_checkpoint(path)


PLAIN = [None, True, -1, 0, 1, 10**30, float("nan"), float("inf"), "text", "", [], {}, [1], {"a": 1}, (1, 2), b"bytes"]
TENSORS = [torch.zeros(0), torch.full((3,), float("nan")), torch.zeros(3, dtype=torch.int64), torch.zeros(1).cfloat()]
odd = st.sampled_from([*PLAIN, *TENSORS])


def paths_in(value, path=()):
    """Return the paths to all values of nested dicts and lists."""
    paths = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        paths += paths_in(inner, (*path, key))
    return paths


@examples(60)
@given(st.data())
def test_checkpoint_states(tmp_path_factory, checkpoint, data):
    """The checksum is valid, but some values are missing or replaced."""
    state = copy.deepcopy(from_bytes(checkpoint.read_bytes()))
    for _ in range(data.draw(st.integers(1, 2))):
        *parents, last = data.draw(st.sampled_from(paths_in(state)))
        inside = state
        for key in parents:
            inside = inside[key]
        if data.draw(st.booleans()) and isinstance(inside, dict):
            del inside[last]
        else:
            inside[last] = copy.deepcopy(data.draw(odd))  # a copy: the value must not contain itself
    directory = tmp_path_factory.mktemp("state")
    path = directory / "odd.pt"
    path.write_bytes(to_bytes(state))
    overrides = [f"{key}={value}" for key, value in FIXED.items()] + [f"checkpoint.resume={path}", "run.name=run"]
    with user_errors_allowed():
        allow = "checkpoint.allow_changed=[train.max_steps,optim.lr]"
        train.train(load_config([], [*overrides, f"run.dir={directory}", "train.max_steps=3", allow]))
    assert {path.name for path in directory.iterdir()} <= {"odd.pt", "run"}


@examples(100)
@given(st.data())
def test_checkpoint_states_of_a_prediction(tmp_path, checkpoint, data):
    state = copy.deepcopy(from_bytes(checkpoint.read_bytes()))
    *parents, last = data.draw(st.sampled_from([path for path in paths_in(state) if path[0] in READ_BY_PREDICT]))
    inside = state
    for key in parents:
        inside = inside[key]
    inside[last] = copy.deepcopy(data.draw(odd))
    path = tmp_path / "odd.pt"
    path.write_bytes(to_bytes(state))
    with user_errors_allowed():
        probabilities = Predictor(path)(torch.zeros(1, 28, 28, dtype=torch.uint8))
        assert probabilities.isfinite().all()
        assert probabilities.shape == (1, 10)


READ_BY_PREDICT = ("input", "classes", "config", "model")


def test_idx_bytes():
    accepted = 0

    @examples(300)
    @given(st.binary(max_size=64) | st.tuples(st.lists(st.integers(0, 2**32 - 1), max_size=5), st.binary(max_size=40)))
    def parse(content):
        nonlocal accepted
        if isinstance(content, tuple):
            content = idx.header(tuple(content[0])) + content[1]
        with contextlib.suppress(ValueError):
            parsed = idx.parse(torch.frombuffer(bytearray(content) or bytearray(1), dtype=torch.uint8))
            assert parsed.numel() <= len(content)
            accepted += 1

    parse()
    assert accepted > 0


@examples(40)
@given(seeds, st.booleans())
def test_idx_files(tmp_path, seed, packed):
    random_ = random.Random(seed)
    from idx_files import small_set, write_set

    directory = tmp_path / f"{seed}-{packed}"
    write_set(directory, small_set(), packed=packed)
    path = random_.choice(sorted(directory.iterdir()))
    path.write_bytes(damaged(path.read_bytes(), random_))
    with user_errors_allowed():
        from distlenet.data.sources import open_data

        with open_data(load_config([], [f"data.root={directory}"]).data):
            pass


FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")


def test_image_bytes(tmp_path):
    accepted, path = 0, tmp_path / "image"
    expected = ImageFormat(1, (28, 28), False, (0.0,), (1.0,), 0.0, 255.0, True)

    @examples(250)
    @given(seeds, st.sampled_from(FORMATS), st.sampled_from(["L", "RGB", "P"]), st.sampled_from(["auto", "yes", "no"]))
    def read(seed, format_, mode, invert):
        nonlocal accepted
        random_ = random.Random(seed)
        file = io.BytesIO()
        try:
            Image.new(mode, (random_.randint(1, 40), random_.randint(1, 40))).save(file, format_)
        except OSError:  # the format does not support the mode
            return
        path.write_bytes(damaged(file.getvalue(), random_))
        with contextlib.suppress(UnreadableImage):
            assert read_image(path, invert, expected, path).shape == (28, 28)
            accepted += 1

    read()
    assert accepted > 0


lines = st.binary(max_size=60) | st.sampled_from(
    [b"null", b"[]", b"1", b'{"step": 1}', b'{"step": "x", "split": "train"}', b'{"step": 1, "split": []}', b"{" * 5000]
)


@examples(150)
@given(st.lists(lines, max_size=5))
def test_history_lines(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(content))
    with user_errors_allowed():
        list(read_records(path))


@examples(25)
@given(st.lists(lines, max_size=4), st.sampled_from(["starts.jsonl", "metrics.jsonl", "summary.json", "config.yaml"]))
def test_training_in_a_run_directory_with_damaged_files(tmp_path_factory, content, name):
    directory = tmp_path_factory.mktemp("directory")
    (directory / "run").mkdir()
    (directory / "run" / name).write_bytes(b"\n".join(content))
    overrides = [f"{key}={value}" for key, value in FIXED.items()] + [f"run.dir={directory}", "run.name=run"]
    with user_errors_allowed():
        train.train(load_config([], overrides))


@examples(60)
@given(st.lists(lines, max_size=4), st.sampled_from(["starts.jsonl", "metrics.jsonl", "summary.json", "config.yaml"]))
def test_a_report_of_damaged_files(tmp_path_factory, checkpoint, content, name):
    run = tmp_path_factory.mktemp("report") / "run"
    run.mkdir()
    for file in checkpoint.parents[1].iterdir():
        if file.is_file():
            (run / file.name).write_bytes(file.read_bytes())
    (run / name).write_bytes(b"\n".join(content))
    with user_errors_allowed():
        assert read_run(run).directory == run


# --- environment

TORCHRUN = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT TORCHELASTIC_USE_AGENT_STORE"
SLURM = (
    "PROCID LOCALID NODEID STEP_NUM_TASKS STEP_TASKS_PER_NODE STEP_NODELIST JOB_ID STEP_ID GPUS_PER_TASK DISTRIBUTION"
)
MPI = "RANK LOCAL_RANK SIZE LOCAL_SIZE"
HYDRA = "PMI_RANK PMI_SIZE MPI_LOCALRANKID MPI_LOCALNRANKS"
NAMES = [*TORCHRUN.split(), *HYDRA.split(), *(f"OMPI_COMM_WORLD_{name}" for name in MPI.split())]
NAMES += ["JOB_COMPLETION_INDEX", *(f"SLURM_{name}" for name in SLURM.split())]
VALUES = """0 1 2 -1 1e3 99999 2(x2) 2(x999999999) n[1-3] n[ (x9) True ²"""
values = st.text(max_size=8) | st.sampled_from(VALUES.split())


@examples(1500)
@given(st.dictionaries(st.sampled_from(NAMES), values))
def test_environments_of_launchers(environ):
    with user_errors_allowed():
        env = read_environment(environ)
        assert 0 <= env.rank < env.world_size
        assert 0 <= env.local_rank < env.local_world_size


OTHER_NAMES = """OMP_NUM_THREADS TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS SLURM_RESTART_COUNT SLURM_JOB_ID
WANDB_MODE COLUMNS LINES TERM NO_COLOR HOME TMPDIR GLOO_SOCKET_IFNAME TORCH_DISTRIBUTED_DEBUG"""


@examples(40)
@given(
    st.dictionaries(
        st.sampled_from(OTHER_NAMES.split()), values.filter(lambda text: "\0" not in text and text.isprintable())
    )
)
def test_training_with_any_environment(tmp_path_factory, environ):
    directory = tmp_path_factory.mktemp("environment")
    with pytest.MonkeyPatch.context() as patch, user_errors_allowed():
        for name, value in environ.items():
            patch.setenv(name, value)
        assert collect_rank_info(load_config([], []), DistributedEnvironment(), DeviceChoice("cpu")).threads >= 1
        overrides = [f"{key}={value}" for key, value in FIXED.items()] + [f"run.dir={directory}", "run.name=run"]
        train.train(load_config([], overrides))


def test_a_deeply_nested_line_of_json(tmp_path):
    """The JSON parser raises RecursionError for it."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(UserError, match="line 1 is not a record"):
        list(read_records(path))
