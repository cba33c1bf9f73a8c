"""The cache of decoded images: the bits, and what happens after kills, damage, without room, and between jobs."""

import io
import os
import shutil
import signal
import tarfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from forked import run_python
from PIL import Image

from distlenet.config.loading import load_config
from distlenet.data import cache_build, cache_file, chunk_decoding, decoding_progress
from distlenet.data.cache_build import CacheBuild, Workers, build_cache
from distlenet.data.cache_file import CHUNK_IMAGES, CacheFile
from distlenet.data.chunk_decoding import ChunkDecoder
from distlenet.data.image_dataset import ImageDataset
from distlenet.data.sources import folder, image_cache, load_data
from distlenet.data.sources.custom import load_custom
from distlenet.data.sources.custom_cache import DIGEST_SAMPLES
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.distributed.rank_log import RankLog
from distlenet.task import Datasets
from distlenet.tasks.image_statistics import measure_images
from distlenet.training.dry_run import plan
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

TRAIN, TEST = 150, 20


def write_images(root):
    """Write JPEG images of several sizes, as a folder and as shards; the order of both is the same."""
    (root / "tar").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", TRAIN), ("test", TEST)):
        with tarfile.open(root / f"tar/{split}-0.tar", "w") as archive:
            for number in range(count):
                pixels = torch.randint(0, 256, (20 + number % 7, 30, 3), dtype=torch.uint8, generator=generator)
                file = io.BytesIO()
                Image.fromarray(pixels.numpy()).save(file, "JPEG")
                path = root / f"folder/{split}/{number % 2}/{number:04d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(file.getvalue())
                for suffix, content in (("jpg", file.getvalue()), ("cls", str(number % 2).encode())):
                    member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def images(made, tmp_path):
    return shutil.copytree(made, tmp_path / "images")  # keeps the modification times


@pytest.fixture
def decoded(monkeypatch):
    """How often each image of a folder is decoded, except the first one, which determines the shape."""
    counts, open_image = Counter(), folder.open_image

    def count(path, *more):
        counts.update([path.name] if path.parts[-3:] != ("train", "0", "0000.jpg") else [])
        return open_image(path, *more)

    monkeypatch.setattr(folder, "open_image", count)
    return counts


def load(images, *more, name="folder", cache="off"):
    words = [f"data.name={name}", f"data.root={images / name}", "data.size=16", f"data.cache={cache}"]
    return load_data(load_config([], [*words, *more]).data)


def pixels_of(dataset):
    if isinstance(dataset, ImageDataset):
        return dataset.get_batch(torch.arange(len(dataset)))[0]
    return torch.stack([dataset[index][0] for index in range(len(dataset))])


def same_bits(one, other):
    pairs = [(pixels_of(getattr(one, split)), pixels_of(getattr(other, split))) for split in ("train", "test")]
    return all(torch.equal(*pair) for pair in pairs)


def cache_files(directory):
    return sorted(path.suffix for path in directory.iterdir())


@pytest.mark.parametrize("name", ["folder", "tar"])
def test_cached_images_have_the_same_bits_as_those_decoded_at_start_and_at_read(images, tmp_path, monkeypatch, name):
    expected = load(images)
    cached = load(images, name=name, cache=tmp_path / "cache")
    assert cache_files(tmp_path / "cache") == [".images", ".lock"]
    assert same_bits(cached, expected)
    assert cached.train.labels.tolist() == load(images, name=name).train.labels.tolist()
    monkeypatch.setattr("distlenet.data.sources.sizing.MAX_DECODED_BYTES", 0)
    monkeypatch.setattr(image_cache, "MAX_DECODED_BYTES", 0)
    read, cached = load(images, name=name), load(images, name=name, cache=tmp_path / "cache")
    assert not isinstance(read.train, ImageDataset)
    assert same_bits(read, cached)
    monkeypatch.setattr("distlenet.tasks.image_statistics.SAMPLED_FILES", 40)
    assert measure_images(cached.train) == measure_images(read.train)  # of the same samples


def test_a_second_job_decodes_nothing(images, tmp_path, decoded):
    first = load(images, cache=tmp_path / "cache")
    assert decoded.total() == TRAIN + TEST - 1
    decoded.clear()
    assert same_bits(load(images, cache=tmp_path / "cache"), first)
    assert not decoded
    assert cache_files(tmp_path / "cache") == [".images", ".lock"]


def test_a_changed_file_or_setting_is_decoded(images, tmp_path, decoded):
    load(images, cache=tmp_path / "cache")
    path = images / "folder/train/1/0005.jpg"
    Image.new("RGB", (30, 20)).save(path)
    assert same_bits(load(images, cache=tmp_path / "cache"), load(images))
    assert load(images, "data.size=8", cache=tmp_path / "cache").train.images.shape == (TRAIN, 3, 8, 8)
    assert len([path for path in (tmp_path / "cache").iterdir() if path.suffix == ".images"]) == 3


def test_a_damaged_image_is_named_and_what_was_decoded_stays(images, tmp_path, decoded):
    path = images / "folder/train/1/0141.jpg"  # of the third chunk
    content, status = path.read_bytes(), path.stat()
    path.write_bytes(content[:100])
    with pytest.raises(UserError, match=rf"^data {path}: is not a readable image: .*; replace or remove the file"):
        load(images, cache=tmp_path / "cache")
    assert cache_files(tmp_path / "cache") == [".chunks", ".lock", ".partial"]
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    Image.new("RGB", (30, 20)).save(images / "folder/train/1/0003.jpg")  # of the first chunk, which is decoded again
    decoded.clear()
    resumed = load(images, cache=tmp_path / "cache")
    assert decoded.total() == TRAIN + TEST - CHUNK_IMAGES - 1
    assert same_bits(resumed, load(images))


def test_a_job_continues_after_a_kill_and_decodes_lost_chunks(images, tmp_path, decoded):
    script = tmp_path / "killed.py"
    script.write_text(f"""
import os, sys
from distlenet.config.loading import load_config
from distlenet.data import cache_build
from distlenet.data.sources import load_data
cache_build.threads_per_rank = lambda workers: 1
write, chunks = cache_build.CacheFile.write_chunk, []
def write_two(*words):
    if len(chunks) == 2:
        os._exit(9)
    chunks.append(write(*words))
cache_build.CacheFile.write_chunk = write_two
words = ["data.name=folder", "data.root={images}/folder", "data.size=16", "data.cache={tmp_path}/cache"]
load_data(load_config([], words).data)
""")
    assert run_python(script).status == 9
    (partial,) = (tmp_path / "cache").glob("*.partial")
    with open(partial, "r+b") as file:  # as after a power cut
        file.seek(CHUNK_IMAGES * 3 * 16 * 16)
        file.write(b"x")
    resumed = load(images, cache=tmp_path / "cache")
    assert decoded.total() == TRAIN + TEST - CHUNK_IMAGES
    assert same_bits(resumed, load(images))


@pytest.mark.parametrize("place", ["first chunk", "second chunk", "table", "end"])
def test_a_damaged_cache_file_is_repaired(images, tmp_path, monkeypatch, capfd, decoded, place):
    monkeypatch.setattr(cache_file, "CHECKED_BYTES", 1)  # the first and the last chunk, unless the time has changed
    load(images, cache=tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("*.images")
    status, size = path.stat(), (TRAIN + TEST) * 3 * 16 * 16
    with open(path, "r+b") as file:
        file.seek({"first chunk": 5, "second chunk": CHUNK_IMAGES * 3 * 16 * 16, "table": size + 2, "end": 0}[place])
        if place == "end":
            file.truncate(size - 1)
        else:
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
    if place != "second chunk":
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    decoded.clear()
    repaired = load(images, cache=tmp_path / "cache")
    assert "is damaged; its damaged images are decoded again" in capfd.readouterr().err
    first = place != "second chunk"
    assert decoded.total() == (CHUNK_IMAGES if "chunk" in place else TRAIN + TEST) - first
    assert same_bits(repaired, load(images))


def test_without_room_auto_warns_and_a_directory_is_refused(images, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(image_cache, "MIN_FILE_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert same_bits(load(images, cache="auto"), load(images))
    needs = f"the decoded images take {(TRAIN + TEST) * 3 * 16 * 16:,} bytes, and 1,000 are free"
    assert f"data.cache=auto: {tmp_path}/distlenet: {needs}; the images are decoded again" in capfd.readouterr().err
    with pytest.raises(UserError, match=rf"data.cache={tmp_path}/own: {needs}; give another directory"):
        load(images, cache=tmp_path / "own")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: .*; give another directory, or data.cache=off"):
        load(images, cache=tmp_path / "file")


def test_auto_caches_large_sets_only(images, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load(images, cache="auto")
    assert not (tmp_path / "distlenet").exists()
    monkeypatch.setattr(image_cache, "MIN_FILE_BYTES", 10_000)
    load(images, cache="auto")
    assert cache_files(tmp_path / "distlenet") == [".images", ".lock"]


def test_without_build_cache_a_complete_file_is_read_and_none_is_made(images, tmp_path, decoded):
    expected = load(images, "data.build_cache=false", cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    assert same_bits(load(images, cache=tmp_path / "cache"), expected)
    decoded.clear()
    assert same_bits(load(images, "data.build_cache=false", cache=tmp_path / "cache"), expected)
    assert not decoded


def color_net():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))


def test_a_dry_run_builds_no_cache(images, tmp_path):
    words = [
        f"model.name={__name__}:color_net",
        "data.name=folder",
        f"data.root={images}/folder",
        "data.size=8",
        f"data.cache={tmp_path}/cache",
    ]
    plan(load_config([], [*words, "device=cpu", "train.global_batch_size=64"]), 2)
    assert not (tmp_path / "cache").exists()


class Counted:
    """Images whose pixels are their index; it counts how often each is decoded."""

    thread_safe = True

    def __init__(self, count: int) -> None:
        self.counts = [0] * count

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.counts[index] += 1
        return torch.full((2, 2), index % 251, dtype=torch.uint8), 0

    def name(self, index: int) -> str:
        return f"image {index}"

    def stamps(self, start: int, stop: int) -> list[str]:
        return [f"{index}" for index in range(start, stop)]


def exchange_of(ranks: int):
    """Return a function that gives each of several threads the values of all."""
    values, barrier = [None] * ranks, threading.Barrier(ranks, timeout=30)

    def make(rank: int):
        def exchange(value):
            values[rank] = value
            barrier.wait()
            result = list(values)
            barrier.wait()
            return result

        return exchange

    return make


def make_file(tmp_path, count: int, node: int = 0) -> CacheFile:
    return CacheFile(tmp_path / f"a{node}.images", tmp_path / f"part{node}.images", count, (2, 2))


def test_all_ranks_of_two_nodes_decode_a_share_each(tmp_path):
    make, images = exchange_of(4), [Counted(1000), Counted(1000)]

    def rank(number: int) -> str:
        node = number // 2
        workers = Workers(number % 2, 2, node, number == 0, make(number))
        return build_cache(make_file(tmp_path, 1000, node), images[node], workers, keep=True)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(rank, range(4))) == [""] * 4
    assert [set(each.counts) for each in images] == [{1}, {1}]
    assert all(make_file(tmp_path, 1000, node).is_intact() for node in (0, 1))
    content = make_file(tmp_path, 1000).path.read_bytes()[:4000]
    assert content == bytes(index % 251 for index in range(1000) for _ in range(4))


@pytest.mark.parametrize(
    ("method", "error", "text"),
    [
        ("__getitem__", UserError("data a.jpg: is damaged"), r"data a\.jpg: is damaged"),
        ("__getitem__", FileNotFoundError("no a.npy"), r"image 64: FileNotFoundError: no a\.npy; fix the dataset"),
        ("stamps", KeyError("a bug"), r".*a0\.images: cannot be written: KeyError: 'a bug'; give data\.cache=off"),
    ],
)
def test_an_error_on_one_rank_is_raised_on_all_ranks_with_the_same_text(tmp_path, method, error, text):
    class Damaged(Counted):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            if method == "__getitem__" and index == CHUNK_IMAGES:  # of the second rank
                raise error
            return super().__getitem__(index)

        def stamps(self, start: int, stop: int) -> list[str]:
            if method == "stamps" and start == CHUNK_IMAGES:
                raise error
            return super().stamps(start, stop)

    make, images = exchange_of(2), Damaged(300)

    def rank(number: int) -> str:
        with pytest.raises(UserError, match=f"^{text}$"):
            build_cache(make_file(tmp_path, 300), images, Workers(number, 2, 0, False, make(number)), keep=False)
        return "raised"

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(rank, range(2))) == ["raised"] * 2
    assert 0 in make_file(tmp_path, 300).read_records()


def test_a_full_disk_ends_the_building_on_all_ranks(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CacheFile, "write_chunk", full)
    make, images = exchange_of(2), Counted(300)

    def rank(number: int) -> str:
        return build_cache(make_file(tmp_path, 300), images, Workers(number, 2, 0, False, make(number)), keep=False)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(rank, range(2))) == ["No space left on device"] * 2
    assert not make_file(tmp_path, 300).partial.exists()


def test_jobs_that_start_together_decode_each_image_once(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(cache_build, "WAIT_S", 0.05)
    images, start = Counted(1000), threading.Barrier(3, timeout=30)

    def job(_: int) -> str:
        start.wait()
        return build_cache(make_file(tmp_path, 1000), images, Workers(shows_progress=False), keep=True)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(job, range(3))) == [""] * 3
    assert set(images.counts) == {1}
    assert "damaged" not in capfd.readouterr().err


def test_a_job_takes_over_when_the_one_that_decodes_ends(tmp_path, capfd):
    images, file = Counted(300), make_file(tmp_path, 300)
    with closing(CacheBuild(file, images, Workers(shows_progress=False), 1)) as other:
        assert other.round([]).state == "decoding"
        waiting = CacheBuild(file, images, Workers(shows_progress=False), 1)
        assert waiting.round([]).state == "waiting"
        assert "another process decodes the images into" in capfd.readouterr().err
    with closing(waiting):
        assert waiting.round([]).state == "decoding"


@pytest.mark.parametrize("tail", [b"\0" * 20, b"4 123"])
def test_a_damaged_line_of_the_records_costs_no_other_chunk(tmp_path, tail):
    """As after a power cut."""
    file, images = make_file(tmp_path, 300), Counted(300)
    file.create()
    file.records.write_bytes(tail)
    assert build_cache(file, images, Workers(shows_progress=False), keep=True) == ""
    assert file.is_intact()
    assert set(images.counts) == {1}


def test_a_chunk_whose_record_is_lost_is_decoded_again(tmp_path):
    file, images = make_file(tmp_path, 300), Counted(300)
    with closing(CacheBuild(file, images, Workers(shows_progress=False), 1)) as build:
        reports = [build.round([])]
        reports = [build.round(reports)]
        lines = file.records.read_text().splitlines(keepends=True)
        file.records.write_text("".join(line for line in lines if not line.startswith("2 ")))
        reports = [build.round(reports)]
        assert (reports[0].state, reports[0].remaining) == ("decoding", 1)
        reports = [build.round([build.round(reports)])]
    assert reports[0].state == "complete"
    assert [row for row, count in enumerate(images.counts) if count == 2] == list(file.rows(2))
    assert file.is_intact()


def test_a_chunk_of_large_images_is_small(tmp_path):
    file = CacheFile(tmp_path / "a.images", tmp_path / "part.images", 100, (3, 3000, 4000))
    assert (file.chunks, list(file.rows(99))) == (100, [99])
    assert len(CacheFile(tmp_path / "a.images", tmp_path / "part.images", 100, (3, 1024, 1024)).rows(0)) == 5


@pytest.mark.usefixtures("python_handles_ctrl_c")
def test_after_ctrl_c_the_threads_end(tmp_path):
    class Interrupting(Counted):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            if index == 0:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            deadline = time.monotonic() + 10
            while not decoder.failed and time.monotonic() < deadline:
                time.sleep(0.001)
            return super().__getitem__(index)

    file = make_file(tmp_path, 2 * CHUNK_IMAGES)
    file.create()
    decoder = ChunkDecoder(file, Interrupting(2 * CHUNK_IMAGES), range(2), 2, None)
    with pytest.raises(KeyboardInterrupt):
        decoder.decode(3600)
    assert decoder.failed


def test_a_round_of_slow_images_ends_inside_a_chunk_and_the_next_continues(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(chunk_decoding, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    class Slow(Counted):
        thread_safe = False

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            clock[0] += cache_build.ROUND_S / 10
            return super().__getitem__(index)

    images = Slow(100)
    with closing(CacheBuild(make_file(tmp_path, 100), images, Workers(shows_progress=False), 9)) as build:
        first = build.round([build.round([])])
        assert (sum(images.counts), first.remaining) == (10, 2)
        second = build.round([first])
        assert (sum(images.counts), second.remaining) == (20, 2)
        assert second != first  # else the time limit would not restart
    assert build_cache(make_file(tmp_path, 100), images, Workers(shows_progress=False), keep=True) == ""
    assert make_file(tmp_path, 100).is_intact()


def test_a_file_that_cannot_be_read_is_not_damaged(images, tmp_path, monkeypatch, capfd):
    def fail(*_: object) -> None:
        raise OSError(24, "Too many open files")

    load(images, cache=tmp_path / "cache")
    monkeypatch.setattr(CacheFile, "has_chunk", fail)
    with pytest.raises(UserError, match=rf"data.cache={tmp_path}/cache: Too many open files; give another directory"):
        load(images, cache=tmp_path / "cache")
    assert "damaged" not in capfd.readouterr().err
    assert cache_files(tmp_path / "cache") == [".images", ".lock"]


def test_a_record_written_in_part_is_a_failure(tmp_path, monkeypatch):
    class Short(io.FileIO):
        def write(self, content: bytes) -> int:
            return super().write(content[:5])

    file = make_file(tmp_path, 70)
    file.create()
    real = open
    monkeypatch.setattr(
        cache_file, "open", lambda path, *mode, **more: Short(path, "ab") if more else real(path, *mode), raising=False
    )
    with pytest.raises(OSError, match=r"part0\.chunks: a line was written in part"):
        file.write_chunk(0, "stamp", [(torch.zeros(2, 2, dtype=torch.uint8), 0)] * CHUNK_IMAGES)
    assert file.read_records() == {}


def test_a_verified_file_gets_its_time_back(tmp_path, monkeypatch):
    file, restarts = make_file(tmp_path, 300), []
    build_cache(file, Counted(300), Workers(shows_progress=False), keep=True)
    written = file.path.stat().st_mtime
    monkeypatch.setattr(cache_file, "CHECKED_BYTES", 1)
    monkeypatch.setattr(cache_file, "restart_time_limit", lambda: restarts.append(1))
    os.utime(file.path, (1, 1))
    assert file.is_intact()
    assert (file.path.stat().st_mtime, len(restarts)) == (written, file.chunks)
    assert file.is_intact()
    assert len(restarts) == file.chunks + 2  # the first chunk and the last one


class Declared:
    """A user's dataset, which counts how often a sample is read."""

    deterministic = True

    def __init__(self, count: int) -> None:
        self.reads = [0] * count
        self.threads: set[int] = set()

    def __len__(self) -> int:
        return len(self.reads)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.reads[index] += 1
        self.threads.add(threading.get_ident())
        return torch.full((3, 5, 7), index, dtype=torch.uint8), (index + len(self)) % 3


def load_declared(tmp_path, train, test, *words, **more):
    config = load_config([], ["data.name=builtins:dict", f"data.cache={tmp_path}", *words]).data
    return load_custom(
        lambda: Datasets(train, test, classes=("a", "b", "c"), **more), {}, config, DistributedEnvironment()
    )


def test_a_dataset_that_declares_to_be_deterministic_is_read_once(tmp_path):
    train, test = Declared(200), Declared(9)
    first = load_declared(tmp_path, train, test, fingerprint={"version": "1"})
    assert (len(first.train), len(first.test)) == (200, 9)
    images, labels = first.train.get_batch(torch.tensor([199, 0, 77]))
    assert (images[:, 2, 4, 6].tolist(), labels.tolist()) == ([199, 0, 77], [0, 2, 1])
    assert first.test.get_batch(torch.tensor([8]))[1].tolist() == [2]
    unread = [row for row, count in enumerate(train.reads) if count == 1]
    assert len(unread) == 200 - DIGEST_SAMPLES  # the others identify the dataset: they are read at each start
    again = load_declared(tmp_path, train, test, fingerprint={"version": "1"})
    assert {train.reads[row] for row in unread} == {1}
    assert torch.equal(again.train.images, first.train.images)
    load_declared(tmp_path, train, test, fingerprint={"version": "2"})
    assert {train.reads[row] for row in unread} == {2}


def test_without_build_cache_a_declared_dataset_is_read_from_a_complete_file_only(tmp_path):
    train, test = Declared(200), Declared(9)
    assert not isinstance(load_declared(tmp_path, train, test, "data.build_cache=false").train, ImageDataset)
    assert list(tmp_path.iterdir()) == []
    load_declared(tmp_path, train, test)
    assert isinstance(load_declared(tmp_path, train, test, "data.build_cache=false").train, ImageDataset)


def test_another_version_of_torch_concerns_only_datasets_of_the_user(images, tmp_path, monkeypatch, decoded):
    train, test = Declared(200), Declared(9)
    load(images, cache=tmp_path / "cache")
    load_declared(tmp_path, train, test)
    decoded.clear()
    monkeypatch.setattr(torch, "__version__", "99.0")
    load(images, cache=tmp_path / "cache")
    load_declared(tmp_path, train, test)
    assert not decoded
    assert min(train.reads) == 2


def test_a_declared_dataset_is_read_by_the_thread_that_made_it(tmp_path):
    train, test = Declared(200), Declared(9)
    load_declared(tmp_path, train, test)
    assert train.threads | test.threads == {threading.get_ident()}


def test_an_exception_of_a_declared_dataset_is_reported_with_its_sample(tmp_path):
    class Broken(Declared):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            if index == CHUNK_IMAGES + 1:  # not one of the samples that identify the dataset
                raise FileNotFoundError(2, "No such file or directory", "a.npy")
            return super().__getitem__(index)

    place = "data.name=builtins:dict, training set, sample 65"
    logs = tmp_path.with_name(f"{tmp_path.name}-run")
    end = f"; fix the dataset; its traceback is in {logs}/logs/rank-00000.log$"
    log = RankLog(DistributedEnvironment(), torch.device("cpu"))
    log.open(logs)
    with closing(log), pytest.raises(UserError, match=rf"^{place}: FileNotFoundError: .*'a\.npy'{end}"):
        load_declared(tmp_path, Broken(200), Declared(9))
    assert 'raise FileNotFoundError(2, "No such' in (logs / "logs/rank-00000.log").read_text()
    assert cache_files(tmp_path) == [".chunks", ".lock", ".partial"]


@pytest.mark.parametrize("more", [{}, {"fingerprint": {"version": "1"}}])
def test_a_changed_sample_is_found(tmp_path, more):
    class Shifted(Declared):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            image, label = super().__getitem__(index)
            return image + 1, label

    assert load_declared(tmp_path, Declared(200), Declared(9), **more).train[5][0].unique().tolist() == [5]
    assert load_declared(tmp_path, Shifted(200), Declared(9), **more).train[5][0].unique().tolist() == [6]


def test_a_declared_dataset_with_a_random_transform_is_refused(tmp_path):
    class Random(Declared):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            image, label = super().__getitem__(index)
            return image + sum(self.reads) % 2, label

    with pytest.raises(UserError, match=r"training set, sample 0: differs at each read, but the dataset declares"):
        load_declared(tmp_path, Random(200), Declared(9))


def test_other_datasets_and_floating_point_are_not_cached(tmp_path, capfd):
    class Undeclared(Declared):
        deterministic = False

    class Floats(Declared):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return super().__getitem__(index)[0].float(), 0

    load_declared(tmp_path, Undeclared(5), Declared(5))
    assert capfd.readouterr().err == ""
    load_declared(tmp_path, Floats(5), Floats(5))
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err.count("its images are torch.float32: only uint8 images are cached") == 1


def test_a_long_decoding_prints_the_file_once_and_then_the_share(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(decoding_progress, "QUIET_S", 0.0)
    monkeypatch.setattr(decoding_progress, "LINE_S", 0.0)
    build_cache(make_file(tmp_path, 300), Counted(300), Workers(), keep=True)
    lines = capfd.readouterr().err.splitlines()
    file = f"{tmp_path}/a0.images (0.0 GB)"
    assert [line for line in lines if file in line] == lines[:1]
    assert lines[0] == f"distlenet: decoding 300 images into {file}, once, for this and later jobs"
    assert lines[-1].startswith("distlenet: decoding 300 images: 100%")


class WaitingProgress:
    """Its first thread waits for its turn until the other one has finished all chunks."""

    def __init__(self):
        self.first, self.complete, self.shares = threading.Lock(), threading.Event(), []

    def update(self, share):
        if self.first.acquire(blocking=False):
            assert self.complete.wait(30)
        self.shares.append(share())
        if self.shares[-1] == 1:
            self.complete.set()


def test_the_share_that_a_thread_shows_is_not_older_than_one_shown_before(tmp_path):
    file, progress = make_file(tmp_path, 600), WaitingProgress()
    file.create()
    ChunkDecoder(file, Counted(600), range(file.chunks), 2, progress).decode(60)
    assert progress.shares == sorted(progress.shares)


def test_selected_images_are_copied_in_parts(monkeypatch):
    monkeypatch.setattr("distlenet.data.image_dataset.COPIED_IMAGES", 3)
    values = torch.arange(20, dtype=torch.uint8)
    selected = ImageDataset(values.view(20, 1, 1), values).select(torch.tensor([7, 1, 19, 4]))
    sizes, index = [], torch.Tensor.__getitem__
    monkeypatch.setattr(torch.Tensor, "__getitem__", lambda self, rows: sizes.append(len(rows)) or index(self, rows))
    copied = selected.to(torch.device("cpu"))
    monkeypatch.undo()
    assert sizes == [3, 1, 4]  # images, and the labels
    assert copied.images.flatten().tolist() == copied.labels.tolist() == [7, 1, 19, 4]
