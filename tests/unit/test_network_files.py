"""What TensorBoard shows of a network: its graph, its inputs, and the vectors of test samples."""

import io
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from distlenet import train
from distlenet.config.loading import load_config
from distlenet.task import Batch
from distlenet.tracking.sidecar import Sidecar
from distlenet.tracking.tensorboard import TensorBoard
from distlenet.training.embeddings import embed
from distlenet.training.network_graph import trace_network
from distlenet.training.outline import TaskOutline
from distlenet.training.thumbnails import find_images, make_sheet, make_thumbnails
from distlenet.utils.nested import map_tensors

pytestmark = pytest.mark.unit


class Branches(nn.Module):
    """A network with a shared layer, an operation in place, and one that returns two tensors."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.head = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3))

    def forward(self, x):
        left, right = self.shared(self.shared(x)).chunk(2, 1)
        return self.head(torch.cat([right, left], 1))


def trace(model, *inputs):
    with torch.no_grad():
        return {node["name"]: node for node in trace_network(model, lambda: model(*inputs))}


def test_the_graph_has_the_operations_in_the_scopes_of_their_modules():
    model = Branches()
    nodes = trace(model, torch.zeros(5, 4))
    inputs = {name: node["inputs"] for name, node in nodes.items() if node["op"] not in ("Parameter", "Input")}
    weights = [f"Branches/shared/{name}" for name in ("weight", "bias")]
    assert inputs == {
        "Branches/shared/linear": ["input", *weights],
        "Branches/shared/linear_1": ["Branches/shared/linear", *weights],
        "Branches/chunk": ["Branches/shared/linear_1"],
        "Branches/cat": ["Branches/chunk:1", "Branches/chunk"],
        "Branches/head/0/relu": ["Branches/cat"],
        "Branches/head/1/linear": ["Branches/head/0/relu", "Branches/head/1/weight", "Branches/head/1/bias"],
        "output": ["Branches/head/1/linear"],
    }
    assert nodes["Branches/chunk"]["shapes"] == [[5, 2], [5, 2]]
    assert nodes["Branches/head/1/weight"]["shapes"] == [[3, 4]]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_module_whose_operations_are_hidden_is_one_node():
    class Hidden(nn.Module):
        def forward(self, x):
            with torch._C.DisableTorchFunction():
                return x + 1

    assert trace(nn.Sequential(Hidden()), torch.zeros(1, 2))["Sequential/0/Hidden"]["inputs"] == ["input"]


class Context:
    """A context without mixed precision."""

    autocast = staticmethod(lambda: torch.no_grad())


class Classification:
    """The parts of a task that an evaluation calls."""

    def transform(self, data, keys):
        return map_tensors(lambda tensor: tensor / 2 if tensor.is_floating_point() else tensor, data)

    def loss(self, model, data):
        outputs = model(data[0])
        return outputs.sum(1), outputs


def embeddings_of(model, limit=5):
    images, labels = torch.rand(8, 9, 9), torch.arange(8)
    batches = [Batch((images[i : i + 4], labels[i : i + 4]), labels[i : i + 4], None, 0, 0, 4) for i in (0, 4)]
    model.train()
    result = embed(TaskOutline(Classification(), ()), model, batches, Context, limit)
    assert model.training
    return images, result


def test_vectors_are_the_inputs_of_the_last_layer():
    model = nn.Sequential(nn.Flatten(), nn.Linear(81, 6), nn.Tanh(), nn.Dropout(0.9), nn.Linear(6, 3))
    images, result = embeddings_of(model)
    vectors = model[1](images.flatten(1) / 2).tanh()[:5].detach()
    torch.testing.assert_close(torch.stack(result.vectors), vectors)  # the same operations in batches of another size
    assert result.labels == [0, 1, 2, 3, 4]
    assert result.predictions == model[4](vectors).argmax(1).tolist()
    assert all(map(torch.equal, result.images, images[:5]))  # as stored, not transformed


def test_vectors_are_the_outputs_of_a_network_that_ends_with_another_operation():
    model = nn.Sequential(nn.Flatten(), nn.Linear(81, 3), nn.Tanh())
    images, result = embeddings_of(model)
    torch.testing.assert_close(torch.stack(result.vectors), model(images / 2)[:5].detach())


def test_fewer_than_three_numbers_are_no_vector():
    assert embeddings_of(nn.Sequential(nn.Flatten(), nn.Linear(81, 2), nn.Tanh()))[1] is None


def test_images_are_found_in_a_batch():
    images = torch.zeros(5, 3, 8, 9, dtype=torch.uint8)
    assert [image.shape for image in find_images((images, torch.zeros(5)), 2)] == [(3, 8, 9)] * 2
    ragged = [torch.zeros(8, 8), torch.zeros(1, 9, 8)]
    assert [image.shape for image in find_images({"boxes": [torch.zeros(1, 4)] * 2, "images": ragged}, 9)] == [
        (8, 8),
        (1, 9, 8),
    ]
    for other in (torch.zeros(5, 3, 7, 9), torch.zeros(5, 2, 8, 8), torch.zeros(5, 8, 8).long(), torch.zeros(()), []):
        assert find_images((other, "text"), 5) == []


def test_each_channel_is_shown_in_its_range():
    image = torch.stack([torch.full((8, 8), float(channel)) for channel in range(3)])
    image[:, 0, 0] += torch.tensor([1.0, 2.0, 4.0])
    dark, bright = make_thumbnails([image, image + torch.tensor([1.0, 0.0, 4.0]).view(3, 1, 1)], 8)
    # Ranges of the channels: 0 to 2, 1 to 3, 2 to 10.
    assert (dark.getpixel((5, 5)), bright.getpixel((5, 5))) == ((0, 0, 0), (128, 0, 128))
    assert (dark.getpixel((0, 0)), bright.getpixel((0, 0))) == ((128, 255, 128), (255, 255, 255))


def test_thumbnails_fit_and_a_sheet_has_one_in_each_cell():
    images = [torch.full((20, 40), 10 * number, dtype=torch.uint8) for number in (1, 2, 3)]
    assert [thumbnail.size for thumbnail in make_thumbnails(images, 10)] == [(10, 5)] * 3
    large = make_thumbnails(images, 90, enlarge=True)
    assert [thumbnail.size for thumbnail in large] == [(80, 40)] * 3
    sheet = make_sheet(large, columns=2, cell=80, gap=2)
    assert sheet.size == (162, 162)
    assert [sheet.getpixel(at) for at in [(79, 39), (80, 0), (82, 0), (0, 81), (0, 82), (82, 82)]] == [
        10,
        0,
        20,
        0,
        30,
        0,
    ]


def train_digits(directory, *more):
    settings = ("data.name=digits", "data.augment=flip_shift", "device=cpu", "train.max_steps=2", "run.name=run")
    train.train(load_config([], [*settings, f"run.dir={directory}", "wandb.mode=disabled", *more]))
    return directory / "run"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run with TensorBoard's files, except the event file: the sidecar's process is not started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sidecar, "launch", lambda _: None)
        return train_digits(tmp_path_factory.mktemp("shown"), "tracking.tensorboard=true")


def test_a_run_is_the_same_without_tensorboard_and_writes_nothing_for_it(run_dir, tmp_path):
    other = train_digits(tmp_path)
    assert not (other / "tensorboard").exists()
    states = [torch.load(path / "checkpoints/last.pt", weights_only=True)["model"] for path in (run_dir, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_event_file_has_the_graph_and_the_inputs(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    TensorBoard(run_dir, {"settings": {}}).finish("finished", {"steps": 2}, {})
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    nodes = {node.name: node for node in events.Graph().node}
    assert list(nodes["Net/conv1/conv2d"].input) == ["input", "Net/conv1/weight", "Net/conv1/bias"]
    (shape,) = nodes["Net/conv1/conv2d"].attr["_output_shapes"].list.shape
    assert [dim.size for dim in shape.dim] == [1, 6, 30, 30]
    width, height, png = events.Tensors("train/inputs")[0].tensor_proto.string_val
    image = Image.open(io.BytesIO(png))
    assert image.size == (int(width), int(height)) == (8 * 128 + 7 * 2,) * 2  # 64 images of 32×32, enlarged
    assert image.getextrema() == (0, 255)


def test_the_projector_has_the_vectors_labels_and_images_of_the_test_set(run_dir):
    from google.protobuf import text_format
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    directory = run_dir / "tensorboard"
    (embedding,) = text_format.Parse((directory / "projector_config.pbtxt").read_text(), ProjectorConfig()).embeddings
    vectors = [list(map(float, line.split("\t"))) for line in lines(directory / embedding.tensor_path)]
    header, *rows = (line.split("\t") for line in lines(directory / embedding.metadata_path))
    assert (len(vectors), {len(vector) for vector in vectors}) == (360, {84})
    assert header == ["label", "prediction", "index"]
    assert [row[2] for row in rows] == [str(index) for index in range(360)]
    sprite, cell = Image.open(directory / embedding.sprite.image_path), list(embedding.sprite.single_image_dim)
    assert (sprite.size, cell) == ((19 * 32, 19 * 32), [32, 32])
    state = torch.load(run_dir / "checkpoints/last.pt", weights_only=True)["model"]
    logits = F.linear(torch.tensor(vectors), state["fc3.weight"], state["fc3.bias"])
    assert [row[1] for row in rows] == [str(digit) for digit in logits.argmax(1).tolist()]
    loss = float(F.cross_entropy(logits, torch.tensor([int(row[0]) for row in rows])))
    summary = json.loads((run_dir / "summary.json").read_text())
    assert loss == pytest.approx(summary["test_loss"], abs=1e-4)  # of about 2.3; vectors are written with six digits


def lines(path: Path):
    return path.read_text().splitlines()


def test_a_network_that_cannot_be_shown_is_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Sidecar, "launch", lambda _: None)
    monkeypatch.setattr("distlenet.training.network_files.find_images", lambda *_: 1 / 0)
    monkeypatch.setattr("distlenet.training.network_files.embed", lambda *_: 1 / 0)
    run_dir = train_digits(tmp_path, "tracking.tensorboard=true")
    assert [path.name for path in (run_dir / "tensorboard").iterdir()] == ["graph.json"]
    text = capsys.readouterr().err
    for what in ("the graph and the inputs of the network", "the vectors of the test samples"):
        assert f"TensorBoard: {what} cannot be written: ZeroDivisionError: division by zero" in text
