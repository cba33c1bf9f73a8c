import gzip
import hashlib
import http.server
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torchvision.datasets
from conftest import LIMIT_S, run_command
from idx_files import digests, original_gz, small_set, write_set

from distlenet.config.loading import load_config
from distlenet.data import download, idx
from distlenet.data.sources import load_data
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit


@pytest.fixture
def no_debian(monkeypatch, tmp_path):
    """Hide an installed Debian package."""
    monkeypatch.setattr(download, "DEBIAN_DIRECTORY", {"fashion_mnist": tmp_path / "not-installed"})


@pytest.fixture
def server():
    """Run a web server on loopback that serves ``files`` and counts ``requests``."""
    files, requests = {}, Counter()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rpartition("/")[2]
            requests[name] += 1
            if name not in files:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(files[name])))
            self.end_headers()
            self.wfile.write(files[name])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        httpd.files, httpd.requests = files, requests
        httpd.url = f"http://127.0.0.1:{httpd.server_port}/"
        yield httpd
        httpd.shutdown()
        thread.join()


def test_fashion_mnist_is_downloaded_by_torchvision_and_verified(
    monkeypatch, tmp_path, no_debian, server, fashion_mnist
):
    """A local server serves the published bytes; torchvision checks their MD5, and we check the SHA-256."""
    for name, path in fashion_mnist.items():
        server.files[f"{name}.gz"] = original_gz(name, path.with_name(f"{name}.gz").read_bytes())
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [server.url])
    config = load_config([], [f"data.root={tmp_path / 'data'}"]).data
    (tmp_path / "data/.download-fashion_mnist-of-a-killed-job/raw").mkdir(parents=True)
    data = load_data(config, fetch=True)
    assert (len(data.train), len(data.test)) == (60000, 10000)
    assert data.train.images.shape[1:] == (28, 28)
    again = load_data(config)
    assert again.source == data.source == str(tmp_path / "data/FashionMNIST/raw")
    assert not [path for path in (tmp_path / "data").iterdir() if path.name.startswith(".download")]


DOWNLOADER = """
import sys, torchvision.datasets
from pathlib import Path
from distlenet.data import download
torchvision.datasets.MNIST.mirrors = [sys.argv[1]]
torchvision.datasets.MNIST.resources = [tuple(pair.split("=")) for pair in sys.argv[3:]]
print(sorted(path.name for path in download.locate_or_download("mnist", Path(sys.argv[2]), fetch=True).values()))
"""


@pytest.mark.slow
def test_one_of_several_processes_downloads(tmp_path, server):
    packed = {f"{name}.gz": gzip.compress(data) for name, data in small_set().items()}
    server.files |= packed
    sums = [f"{name}={hashlib.md5(data).hexdigest()}" for name, data in packed.items()]
    command = [sys.executable, "-c", DOWNLOADER, server.url, str(tmp_path / "data"), *sums]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=LIMIT_S) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert len({stdout for stdout, _ in outputs}) == 1
    # torchvision requests each file twice: for redirects, then for the content.
    assert set(server.requests.values()) == {2}


def test_a_damaged_download_is_not_used(monkeypatch, tmp_path, no_debian, server):
    server.files |= {f"{name}.gz": gzip.compress(data) for name, data in small_set().items()}  # other contents
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [server.url])
    with pytest.raises(UserError, match="File not found or corrupted"):
        download.locate_or_download("fashion_mnist", Path("data"), fetch=False)
    assert idx.find_files(tmp_path / "data/FashionMNIST/raw") is None


def test_without_a_network_the_error_lists_the_ways_to_get_the_data(monkeypatch, tmp_path, no_debian):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", ["http://127.0.0.1:1/"])
    with pytest.raises(UserError) as error:
        download.locate_or_download("fashion_mnist", Path("data"), fetch=False)
    message = str(error.value)
    for part in (
        "refused",
        "data/FashionMNIST/raw",
        "apt install dataset-fashion-mnist",
        "python -m distlenet.data",
        "--config ci",
    ):
        assert part in message
    assert "\n" not in message


def test_debians_directory_is_used_only_with_the_default_data_root(monkeypatch, tmp_path):
    system, root = tmp_path / "system", Path("data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download, "DEBIAN_DIRECTORY", {"fashion_mnist": system})
    write_set(system, small_set(), packed=True)
    assert {path.parent for path in download.locate("fashion_mnist", root).values()} == {system}
    assert download.locate("fashion_mnist", tmp_path / "other") is None
    write_set(root / "FashionMNIST/raw", small_set(), packed=True)
    assert {p.parent for p in download.locate("fashion_mnist", root).values()} == {root / "FashionMNIST/raw"}
    write_set(root, small_set(), packed=True)
    assert {path.parent for path in download.locate("fashion_mnist", root).values()} == {root}


def test_a_data_root_without_the_data_set_is_refused_without_a_download(tmp_path):
    (tmp_path / "train/cat").mkdir(parents=True)
    (tmp_path / "train/cat/1.png").touch()
    with pytest.raises(UserError) as error:
        load_data(load_config([], [f"data.root={tmp_path}"]).data)
    for part in (
        f"are not in {tmp_path}, {tmp_path}/FashionMNIST/raw;",
        "give data.name=folder",
        "python -m distlenet.data",
    ):
        assert part in str(error.value)


def test_a_damaged_file_is_named(monkeypatch, tmp_path):
    content = small_set()
    monkeypatch.setitem(idx.SHA256, "fashion_mnist", digests(content))
    config = load_config([], [f"data.root={tmp_path}"]).data
    write_set(tmp_path, content, packed=True)
    assert len(load_data(config).train) == 30
    damaged = tmp_path / "t10k-labels-idx1-ubyte.gz"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(UserError, match=str(damaged)):
        load_data(config)


def test_debians_package_is_extracted_without_root(monkeypatch, tmp_path, no_debian):
    """Package and dpkg are real; a script replaces apt-get and copies the package."""
    package = tmp_path / "package"
    write_set(package / "usr/share/datasets/fashion-mnist", small_set(), packed=True)
    (package / "DEBIAN").mkdir()
    (package / "DEBIAN/control").write_text(
        "Package: dataset-fashion-mnist\nVersion: 1\nArchitecture: all\n"
        "Maintainer: nobody <nobody@example.org>\nDescription: a small set\n"
    )
    run_command("dpkg-deb", "--build", package, tmp_path / "set.deb").succeeded()
    (tmp_path / "bin").mkdir()
    apt_get = tmp_path / "bin/apt-get"
    apt_get.write_text(f'#!/bin/sh\n[ "$1" = download ] && cp {tmp_path / "set.deb"} dataset-fashion-mnist_1_all.deb\n')
    apt_get.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", ["http://127.0.0.1:1/"])
    monkeypatch.setattr(download, "DEBIAN_DIRECTORY", {"fashion_mnist": Path("/usr/share/datasets/fashion-mnist")})
    monkeypatch.setattr(
        download, "locate", lambda name, root: idx.find_files(download.torchvision_directory(name, root))
    )
    monkeypatch.chdir(tmp_path)
    root = Path("data")  # relative, as data.root is by default
    with pytest.raises(UserError, match="refused"):
        download.locate_or_download("fashion_mnist", root, fetch=False)
    files = download.locate_or_download("fashion_mnist", root, fetch=True)
    assert {path.parent for path in files.values()} == {root / "FashionMNIST/raw"}


def test_an_unusable_data_root_is_named(tmp_path, no_debian):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)  # unreadable for root too
    with pytest.raises(UserError, match=f"data.root={loop}: is not a readable directory"):
        download.locate("fashion_mnist", loop)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a readable directory"):
        download.locate_or_download("fashion_mnist", tmp_path / "file", fetch=True)
    with pytest.raises(UserError, match="cannot be written"):
        download.locate_or_download("fashion_mnist", Path("/proc/no/such"), fetch=True)


def test_a_failed_download_removes_the_directory_that_it_created(monkeypatch, tmp_path, no_debian):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", ["http://127.0.0.1:1/"])
    with pytest.raises(UserError, match="cannot be downloaded"):
        download.locate_or_download("fashion_mnist", Path("data"), fetch=False)
    assert not (tmp_path / "data").exists()


def test_a_failed_download_keeps_what_another_process_has_put_there(monkeypatch, tmp_path, no_debian):
    def fail(name, root, fetch):
        write_set(root, small_set(), packed=False)
        raise UserError("no network")

    monkeypatch.setattr(download, "_download", fail)
    with pytest.raises(UserError, match="no network"):
        download.locate_or_download("fashion_mnist", tmp_path / "shared", fetch=True)
    assert download.locate("fashion_mnist", tmp_path / "shared")
