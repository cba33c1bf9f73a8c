"""The manifests for Kubernetes: their schema, and the numbers and names that must agree."""

import signal

import pytest
import yaml
from conftest import REPO
from torch.distributed import run

from distlenet.config.loading import load_config
from distlenet.utils.startup import PREEMPTED

pytestmark = pytest.mark.unit

DIRECTORY = REPO / "launch/kubernetes"
TORCHRUN_KILLS_S = 30  # after it forwards SIGTERM; run.parse_args has it as --shutdown-timeout in newer versions


def objects(name):
    return list(yaml.safe_load_all((DIRECTORY / name).read_text()))


def merge(base, patch, key="name"):
    """Return the strategic merge of the values of gpu.yaml: lists of objects by their names, others replaced."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return base | {name: merge(base.get(name), value) for name, value in patch.items()}
    if isinstance(base, list) and all(isinstance(item, dict) and key in item for item in [*base, *patch]):
        changes = {item[key]: item for item in patch}
        assert changes.keys() <= {item[key] for item in base}
        return [merge(item, changes.get(item[key], {})) for item in base]
    return patch


SERVICE, JOB = objects("job.yaml")
GPU_JOB = merge(JOB, objects("gpu.yaml")[0])
RUNTIME, TRAINJOB = objects("trainjob.yaml")
INNER_JOB = RUNTIME["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]
JOBS = pytest.mark.parametrize("job", [JOB, GPU_JOB, INNER_JOB], ids=["CPU", "GPU", "TrainJob"])


def container_of(job):
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return container


def torchrun_arguments(container):
    arguments = [str(word).replace("$(JOB_COMPLETION_INDEX)", "1") for word in container["args"]]
    return run.parse_args(arguments)


def test_the_schemas_of_kubernetes_accept_the_manifests():
    """kubernetes-validate has 110 MB, so it is not in the extra dev: pip install kubernetes-validate runs this test."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    refused = []
    for manifest in (*objects("storage.yaml"), SERVICE, JOB, GPU_JOB):
        try:
            kubernetes_validate.validate(manifest, "1.31", strict=True)
        except kubernetes_validate.ValidationError as error:
            refused.append(str(error))
    assert refused == []


@JOBS
def test_a_preempted_pod_has_time_to_save_and_is_replaced(job):
    pod = job["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > max(load_config().checkpoint.preemption_grace_s, TORCHRUN_KILLS_S)
    disrupted, saved = job["spec"]["podFailurePolicy"]["rules"]
    assert disrupted == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    name = container_of(job)["name"]
    codes = {"containerName": name, "operator": "In", "values": [PREEMPTED, 128 + signal.SIGTERM]}
    assert saved == {"action": "Ignore", "onExitCodes": codes}
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy requires it


@JOBS
def test_volumes(job):
    pod = job["spec"]["template"]["spec"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container_of(job)["volumeMounts"]}
    assert mounts == {"shared": "/shared", "shm": "/dev/shm"}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    (claim,) = objects("storage.yaml")
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize("job", [JOB, GPU_JOB], ids=["CPU", "GPU"])
def test_the_arguments_agree_with_the_job(job):
    container = container_of(job)
    options = torchrun_arguments(container)
    resources = container["resources"]
    ranks = resources["limits"].get("nvidia.com/gpu") or int(resources["requests"]["cpu"])
    assert int(options.nproc_per_node) == ranks
    assert int(options.nnodes) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert (int(options.node_rank), job["spec"]["completionMode"]) == (1, "Indexed")
    assert options.master_addr == f"{job['metadata']['name']}-0.{SERVICE['metadata']['name']}"
    assert job["spec"]["template"]["spec"]["subdomain"] == SERVICE["metadata"]["name"]
    assert SERVICE["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert options.master_port == container["ports"][0]["containerPort"]
    assert_trains(options)


def assert_trains(options):
    assert (options.rdzv_backend, options.max_restarts, options.module) == ("static", 0, True)
    assert options.training_script == "distlenet.train"
    config = load_config([], options.training_script_args)
    assert config.run.dir.startswith("/shared/")
    assert config.data.root.startswith("/shared/")


def test_trainjob():
    trainer = TRAINJOB["spec"]["trainer"]
    assert int(trainer["resourcesPerNode"]["requests"]["cpu"]) == trainer["numProcPerNode"]
    assert TRAINJOB["spec"]["runtimeRef"]["name"] == RUNTIME["metadata"]["name"]
    assert RUNTIME["spec"]["mlPolicy"]["numNodes"] == trainer["numNodes"]
    assert container_of(INNER_JOB)["command"] == container_of(JOB)["command"]
    assert_trains(torchrun_arguments(trainer))


def test_kustomization():
    (kustomization,) = objects("kustomization.yaml")
    assert kustomization["resources"] == ["storage.yaml", "job.yaml"]
    assert container_of(JOB)["image"].partition(":")[0] == kustomization["images"][0]["name"]
