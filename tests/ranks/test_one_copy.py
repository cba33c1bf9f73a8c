"""All ranks of a node share one copy of the images in memory."""

import json

import pytest
from forked import run_ranks

pytestmark = pytest.mark.ranks

PROGRAM = r"""
import json, re, sys
import torch.distributed as dist
from distlenet.config.loading import load_config
from distlenet.data import synthetic
from distlenet.data.sources import load_on_node
from distlenet.distributed.context import init_distributed
synthetic.MAX_IMAGES_IN_MEMORY = 10
config = load_config([], ["device=cpu", *sys.argv[2:]])
with init_distributed(config) as context:
    images = load_on_node(config.data, context.env).train.images
    assert images.sum() > 0  # reads every page
    dist.barrier()
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", open("/proc/self/smaps").read(), flags=re.M)[1:]:
        low, high = (int(end, 16) for end in mapping.split()[0].split("-"))
        if low <= images.data_ptr() < high:
            kilobytes = {key: int(value) for key, value in re.findall(r"^(\w+): +(\d+) kB", mapping, re.M)}
            info = {"inode": mapping.split()[4], "needed": images.nbytes // 1024, **kilobytes}
            with open(f"{sys.argv[1]}/{context.env.rank}.json", "w") as file:
                json.dump(info, file)
    dist.barrier()
"""


@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_ranks_of_a_node_share_the_pages(tmp_path, storage):
    overrides = ["data.name=digits"]
    if storage == "disk":
        overrides = ["data.name=synthetic", "data.synthetic_train=20000", f"data.root={tmp_path}"]
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    run_ranks(3, script, tmp_path, *overrides).succeeded()
    mappings = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert len({mapping["inode"] for mapping in mappings}) == 1
    for mapping in mappings:
        assert mapping["Shared_Clean"] + mapping["Shared_Dirty"] >= mapping["needed"] > 1000
        assert mapping["Private_Clean"] + mapping["Private_Dirty"] == 0
