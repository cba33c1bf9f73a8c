"""The fake runtime for the processes of these tests; the tests are skipped, with the reason, if it cannot be had."""

import os
from multiprocessing import forkserver
from unittest import mock

import pytest

from fake_cuda.build import why_not
from fake_cuda.runner import environment


@pytest.fixture(scope="session", autouse=True)
def _fake_runtime():
    if reason := why_not():
        if os.environ.get("DISTLENET_FAKE_CUDA") == "required":
            pytest.fail(reason)
        pytest.skip(f"no fake CUDA runtime: {reason}")
    forkserver._forkserver._stop()  # the processes of other tests do not come from a server with the fake runtime
    with mock.patch.dict(os.environ, environment()):
        yield
        forkserver._forkserver._stop()
