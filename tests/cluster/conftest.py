"""What the tests on several hosts share: one SLURM cluster for all of them."""

import os
from collections.abc import Iterator

import pytest

from cluster.slurm_cluster import ClusterUnavailableError, SlurmCluster


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """Three nodes of four CPUs. A machine without root or SLURM skips, with that reason; any other failure fails."""
    try:
        cluster = SlurmCluster(nodes=3, cpus=4)
    except ClusterUnavailableError as error:
        if os.environ.get("DISTLENET_SLURM") == "required":  # make test-cluster
            raise
        pytest.skip(str(error))
    with cluster:
        yield cluster
