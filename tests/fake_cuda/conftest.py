"""Skip the tests of this directory, with the reason, if the machine cannot have the fake runtime."""

import os

import pytest

from fake_cuda.build import library, why_not


@pytest.fixture(scope="session", autouse=True)
def _fake_runtime():
    if reason := why_not():
        if os.environ.get("DISTLENET_FAKE_CUDA") == "required":
            pytest.fail(reason)
        pytest.skip(f"no fake CUDA runtime: {reason}")
    library()  # compiled before a test's time limit begins
