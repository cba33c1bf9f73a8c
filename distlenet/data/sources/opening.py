"""Open the configured data set, in a job once per node, and map it on every rank."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

from distlenet.config.names import check_arguments, is_import_name, resolve
from distlenet.config.schema import DataConfig
from distlenet.data import download, idx
from distlenet.data.cache_build import Workers, build_cache, is_built
from distlenet.data.cache_file import CacheFile
from distlenet.data.sources.array import open_array
from distlenet.data.sources.cifar10 import DIRECTORY, open_cifar10
from distlenet.data.sources.custom import load_custom
from distlenet.data.sources.folder import open_folder
from distlenet.data.sources.idx_sets import open_digits, open_generated, open_published
from distlenet.data.sources.image_cache import join_images, plan_cache, use_cache
from distlenet.data.sources.opened import OpenedImages, Source, StoredImages
from distlenet.data.sources.sizing import fit_sizes
from distlenet.data.sources.tar import open_tar
from distlenet.data.validation import split_validation
from distlenet.distributed.collectives import (
    all_gather_object,
    broadcast_from_local_rank_0,
    has_process_group,
    raise_on_all_ranks,
)
from distlenet.distributed.environment import DistributedEnvironment, read_environment
from distlenet.task import Datasets, MapDataset
from distlenet.utils.errors import UserError, warn

SOURCES: dict[str, Source] = {
    "fashion_mnist": open_published,
    "mnist": open_published,
    "digits": open_digits,
    "synthetic": open_generated,
    "folder": open_folder,
    "array": open_array,
    "tar": open_tar,
    "cifar10": open_cifar10,
}
"""What opens each data set, by ``data.name``."""


@contextmanager
def open_data(config: DataConfig, fetch: bool = False) -> Iterator[OpenedImages]:
    """Open the configured data set, verified and with all images of one size, for the ranks of this node.

    Mappings stay valid after the context ends. ``fetch`` allows a download by every way and into any ``data.root``.
    Raise UserError if the data is unavailable or damaged.
    """
    with ExitStack() as stack:
        opened = _open_source(config, stack, fetch)
        file, wanted = _plan(opened, config)
        problem = ""
        if file is not None and wanted:
            problem = build_cache(file, join_images(opened, config), Workers(), keep=config.cache != "auto")
        yield fit_sizes(use_cache(opened, file, problem, config, stack), config, stack)


def _open_source(config: DataConfig, stack: ExitStack, fetch: bool = False) -> OpenedImages:
    if config.args:
        raise UserError(f"data.args: data.name={config.name} accepts none; remove {', '.join(config.args)}")
    return SOURCES[config.name](config, stack, fetch)


def map_data(opened: OpenedImages) -> Datasets:
    """Map the files that a process of this node holds open. Raise OSError if they are not visible to this process."""
    splits = [
        split.map() if isinstance(split, StoredImages) else cast("MapDataset | None", split)  # as fit_sizes returns it
        for split in (opened.train, opened.test, opened.validation)
    ]
    train, test, validation = splits
    assert train is not None
    assert test is not None
    return Datasets(
        train,
        test,
        source=opened.source,
        validation=validation,
        classes=opened.classes,
        fingerprint=opened.fingerprint,
    )


def load_data(config: DataConfig, fetch: bool = False) -> Datasets:
    """Open and map the configured data set in this process. Raise UserError as ``open_data``."""
    if is_import_name(config.name):
        return _load_function(config, DistributedEnvironment())
    with open_data(config, fetch) as opened:
        return split_validation(map_data(opened), config.validation)


def load_images(config: DataConfig) -> Datasets:
    """Load the configured data set, in a job once per node. Raise UserError as ``open_data``. A collective."""
    if not has_process_group():
        return load_data(config)
    env = read_environment(os.environ)
    return _load_function(config, env) if is_import_name(config.name) else load_on_node(config, env)


def _load_function(config: DataConfig, env: DistributedEnvironment) -> Datasets:
    function = resolve("data.name", config.name, {})
    if config.root != DataConfig().root:
        raise UserError(
            f"data.root={config.root}: data.name={config.name} receives data.args only; give data.args.root="
            f"{config.root}, if it has this argument"
        )
    check_arguments("data.args", function, config.args)
    return load_custom(function, config.args, config, env)


def load_on_node(config: DataConfig, env: DistributedEnvironment) -> Datasets:
    """Load once per node: its first rank opens and verifies, all its ranks map the same memory. A collective.

    All its ranks decode the images that are not in the cache yet.
    """
    with ExitStack() as stack:
        opened, file, wanted = None, None, False
        with raise_on_all_ranks():
            if env.local_rank == 0:
                opened = _open_source(config, stack)
                file, wanted = _plan(opened, config)
        problem = _decode_on_node(opened, file if wanted else None, config, env)
        with raise_on_all_ranks():
            if opened is not None:
                opened = fit_sizes(use_cache(opened, file, problem, config, stack), config, stack)
        opened = broadcast_from_local_rank_0(opened, env)
        with raise_on_all_ranks():  # a collective: no rank closes the files before all have mapped them
            try:
                return split_validation(map_data(opened), config.validation)
            except OSError as error:
                warn(
                    f"rank {env.rank}: cannot map the images that local rank 0 has opened ({error}) and keeps a copy "
                    "of them; let the ranks of a node share their process namespace"
                )
                return load_data(config)


def _plan(opened: OpenedImages, config: DataConfig) -> tuple[CacheFile | None, bool]:
    """Return the file of the decoded images, or None if none is used, and whether they have to be decoded into it."""
    file = plan_cache(opened, config)
    if file is None or is_built(file):
        return file, False
    return (file, True) if config.build_cache else (None, False)


def _decode_on_node(
    opened: OpenedImages | None, file: CacheFile | None, config: DataConfig, env: DistributedEnvironment
) -> str:
    """Decode into ``file``, which local rank 0 gives, as ``build_cache``. A collective."""
    if not any(all_gather_object(file is not None)):
        return ""
    # The list of the image files is sent only here: it can be large.
    images, file = broadcast_from_local_rank_0((opened if file is not None else None, file), env)
    dataset = join_images(images, config) if images is not None else None
    workers = Workers(env.local_rank, env.local_world_size, env.node_rank, env.rank == 0, all_gather_object)
    return build_cache(file, dataset, workers, keep=config.cache != "auto")


def require_local_data(config: DataConfig) -> None:
    """Raise UserError if the configured data set is not on this machine; download nothing."""
    name, root = f"data.name={config.name}", Path(config.root)
    if config.name == "cifar10" and not (root / DIRECTORY).is_dir():
        raise UserError(f"{name}: is not in {root / DIRECTORY}; run python -m distlenet.data {name} data.root={root}")
    if config.name in idx.SHA256 and download.locate(config.name, root) is None:
        missing = download.not_found(config.name, root)
        raise UserError(f"{missing}; run python -m distlenet.data {name} data.root={root}")
