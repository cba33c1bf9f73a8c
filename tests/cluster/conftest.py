"""The SLURM cluster that all tests on several hosts share."""

import os
from collections.abc import Iterator

import pytest

from cluster.slurm_cluster import ClusterUnavailableError, SlurmCluster


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """Start three nodes with four CPUs each. Without root or SLURM the tests are skipped; other failures are errors."""
    try:
        cluster = SlurmCluster(nodes=3, cpus=4)
    except ClusterUnavailableError as error:
        if os.environ.get("DISTLENET_SLURM") == "required":  # make test-cluster
            raise
        pytest.skip(str(error))
    with cluster:
        yield cluster
