import gzip
import hashlib
import os
import re
from contextlib import closing

import pytest
import torch
import torchvision.datasets
from idx_files import idx_bytes, original_gz, small_set, write_set

from distlenet.data import idx
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_the_checksums_belong_to_the_files_of_torchvision(fashion_mnist):
    """Each published .gz file has torchvision's MD5, and its contents have our SHA-256."""
    published = dict(torchvision.datasets.FashionMNIST.resources)
    for name, path in fashion_mnist.items():
        packed = original_gz(name, path.with_name(f"{name}.gz").read_bytes())
        assert hashlib.md5(packed).hexdigest() == published[f"{name}.gz"]
        assert sha256(gzip.decompress(packed)) == idx.SHA256["fashion_mnist"][name]


@pytest.mark.parametrize("shape", [(3,), (2, 5), (4, 28, 28), (0, 28, 28)])
@pytest.mark.parametrize("packed", [False, True])
def test_a_written_file_is_read_back(tmp_path, shape, packed):
    values = torch.randint(0, 256, shape, dtype=torch.uint8)
    data = idx_bytes(values)
    path = tmp_path / ("x.gz" if packed else "x")
    path.write_bytes(gzip.compress(data) if packed else data)
    with closing(idx.open_verified(path, sha256(data))) as file:
        mapped = idx.parse(file.ref.map())
    assert torch.equal(mapped, values)  # also after the file is closed


def test_the_header_is_that_of_the_format():
    assert idx.header((2, 300)) + bytes(600) == idx_bytes(torch.zeros(2, 300, dtype=torch.uint8))


@pytest.mark.parametrize("keep", [0, 1, 5, 9, 10, 17, 300, -1])
def test_a_truncated_gz_is_named(tmp_path, keep):
    data = idx_bytes(torch.randint(0, 256, (2, 28, 28), dtype=torch.uint8))
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(data)[:keep])
    with pytest.raises(UserError, match=re.escape(str(path))):
        idx.open_verified(path, sha256(data))


def test_one_flipped_bit_is_detected(tmp_path):
    data = bytearray(idx_bytes(torch.zeros(2, 28, 28, dtype=torch.uint8)))
    path = tmp_path / "train-images-idx3-ubyte"
    digest = sha256(data)
    data[700] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"data {path}: is not the published file"):
        idx.open_verified(path, digest)


@pytest.mark.parametrize(
    "data",
    [b"", b"\0\0", b"\0\0\x0d\1\0\0\0\0", b"\1\0\x08\1\0\0\0\0", b"\0\0\x08\3\0\0\0\1", b"\0\0\x08\1\0\0\0\2x"],
)
def test_bytes_of_another_format_are_refused(data):
    with pytest.raises(ValueError, match="IDX"):
        idx.parse(torch.tensor(list(data), dtype=torch.uint8))


def test_find_files_prefers_plain_files_and_requires_all_four(tmp_path):
    assert idx.find_files(tmp_path) is None
    assert idx.find_files(tmp_path / "none") is None
    write_set(tmp_path, small_set(), packed=True)
    assert {path.suffix for path in idx.find_files(tmp_path).values()} == {".gz"}
    write_set(tmp_path, small_set(), packed=False)
    assert {path.suffix for path in idx.find_files(tmp_path).values()} == {""}
    for path in tmp_path.glob("t10k-labels*"):
        path.unlink()
    with pytest.raises(UserError, match="lacks t10k-labels-idx1-ubyte"):
        idx.find_files(tmp_path)


@pytest.mark.timeout(30)
def test_a_path_that_is_not_a_regular_file_is_named(tmp_path):
    """A pipe would block; a directory and a link to itself are unreadable for root too."""
    pipe, directory, loop = (tmp_path / name for name in ("pipe", "directory", "loop"))
    os.mkfifo(pipe)
    directory.mkdir()
    loop.symlink_to(loop)
    for path in (pipe, directory, loop):
        with pytest.raises(UserError, match=f"data {path}: cannot be read: not a regular file"):
            idx.open_verified(path, "0" * 64)


def test_a_gz_is_decompressed_up_to_the_size_of_published_files(tmp_path, monkeypatch):
    monkeypatch.setattr(idx, "MAX_BYTES", 1000)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(bytes(1001)))
    with pytest.raises(UserError, match="more than 1,000 bytes"):
        idx.open_verified(path, "0" * 64)
    path.write_bytes(gzip.compress(bytes(1000)))
    with pytest.raises(UserError, match="not the published file"):
        idx.open_verified(path, "0" * 64)
