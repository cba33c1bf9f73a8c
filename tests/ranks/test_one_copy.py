"""All ranks of a node share one copy of the images in memory."""

import json

import pytest
from forked import run_ranks
from PIL import Image

pytestmark = pytest.mark.ranks

PROGRAM = r"""
import json, re, sys
import torch.distributed as dist
from distlenet.config.loading import load_config
from distlenet.data import synthetic
from distlenet.data.sources import load_images
from distlenet.distributed.context import init_distributed
synthetic.MAX_IMAGES_IN_MEMORY = 10
config = load_config([], ["device=cpu", *sys.argv[2:]])
with init_distributed(config) as context:
    images = load_images(config.data).train.images
    assert images.sum() > 0  # reads every page
    dist.barrier()
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", open("/proc/self/smaps").read(), flags=re.M)[1:]:
        low, high = (int(end, 16) for end in mapping.split()[0].split("-"))
        if low <= images.data_ptr() < high:
            kilobytes = {key: int(value) for key, value in re.findall(r"^(\w+): +(\d+) kB", mapping, re.M)}
            means = images.double().mean((*range(1, images.dim()),)).tolist()
            info = {"inode": mapping.split()[4], "needed": images.nbytes // 1024, "means": means, **kilobytes}
            with open(f"{sys.argv[1]}/{context.env.rank}.json", "w") as file:
                json.dump(info, file)
    dist.barrier()
"""

IMAGES = 320  # of 4 KiB: a multiple of what the kernel maps at once

DECLARED = f"""
import torch
from distlenet.task import Datasets
class Squares(torch.utils.data.Dataset):
    deterministic = True
    def __len__(self): return {IMAGES}
    def __getitem__(self, index): return torch.full((64, 64), index // 2, dtype=torch.uint8), 0
def make(): return Datasets(Squares(), Squares(), classes=("square",))
"""


@pytest.mark.parametrize("storage", ["memory", "disk", "cache of files", "cache of a dataset"])
def test_ranks_of_a_node_share_the_pages(tmp_path, storage):
    """The images of a cache are decoded by all ranks."""
    overrides = ["data.name=digits"]
    if storage == "disk":
        overrides = ["data.name=synthetic", "data.synthetic_train=20000", f"data.root={tmp_path}"]
    if storage == "cache of files":
        for split in ("train", "test"):
            (tmp_path / split / "square").mkdir(parents=True)
            for index in range(IMAGES):
                Image.new("L", (64, 64), index // 2).save(tmp_path / f"{split}/square/{index:03d}.pgm")
        overrides = ["data.name=folder", f"data.root={tmp_path}", f"data.cache={tmp_path}/cache"]
    if storage == "cache of a dataset":
        (tmp_path / "squares.py").write_text(DECLARED)
        overrides = ["data.name=squares:make", f"data.cache={tmp_path}/cache"]
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    run_ranks(3, script, tmp_path, *overrides).succeeded()
    mappings = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert len({mapping["inode"] for mapping in mappings}) == 1
    for mapping in mappings:
        assert mapping["Shared_Clean"] + mapping["Shared_Dirty"] >= mapping["needed"] > 1000
        assert mapping["Private_Clean"] + mapping["Private_Dirty"] == 0
        if storage.startswith("cache"):
            assert mapping["means"] == [index // 2 for index in range(IMAGES)]
