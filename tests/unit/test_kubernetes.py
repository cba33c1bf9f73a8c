"""The manifests for Kubernetes: their schema, and the numbers and names that must agree.

The package kubeflow-trainer-api has pydantic models of the OpenAPI schemas of Kubernetes and of Kubeflow Trainer.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import REPO, Job
from kubeflow_trainer_api import models
from torch.distributed import run

from distlenet.config.loading import load_config
from distlenet.prove.processes import free_port
from distlenet.utils.startup import PREEMPTED

pytestmark = pytest.mark.unit

DIRECTORY = REPO / "launch/kubernetes"
TORCHRUN_KILLS_S = 30  # after it forwards SIGTERM; run.parse_args has it as --shutdown-timeout in newer versions


def objects(name):
    return list(yaml.safe_load_all((DIRECTORY / name).read_text()))


def merge(base, patch, key="name"):
    """Return the strategic merge of a patch: lists of objects by their names, others replaced; null removes."""
    if isinstance(base, dict) and isinstance(patch, dict):
        merged = base | {name: merge(base.get(name), value) for name, value in patch.items()}
        return {name: value for name, value in merged.items() if value is not None}
    if isinstance(base, list) and all(isinstance(item, dict) and key in item for item in [*base, *patch]):
        changes = {item[key]: item for item in patch}
        assert changes.keys() <= {item[key] for item in base}
        return [merge(item, changes.get(item[key], {})) for item in base]
    return patch


(CLAIM,) = objects("storage.yaml")
SERVICE, JOB = objects("job.yaml")
GPU_JOB = merge(JOB, objects("gpu.yaml")[0])
S3_JOB = merge(JOB, objects("s3.yaml")[0])
RUNTIME, TRAINJOB = objects("trainjob.yaml")
INNER_JOB = RUNTIME["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]
JOBS = pytest.mark.parametrize("job", [JOB, GPU_JOB, S3_JOB, INNER_JOB], ids=["CPU", "GPU", "S3", "TrainJob"])
QUANTITY = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([KMGTPE]i|[mkMGTPE]|[eE][+-]?[0-9]+)?"
"""<quantity> in https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/"""


def container_of(job):
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return container


def arguments_of(job):
    return TRAINJOB["spec"]["trainer"]["args"] if job is INNER_JOB else container_of(job)["args"]


def torchrun_arguments(container):
    arguments = [str(word).replace("$(JOB_COMPLETION_INDEX)", "1") for word in container["args"]]
    return run.parse_args(arguments)


MODELS = {
    "PersistentVolumeClaim": models.IoK8sApiCoreV1PersistentVolumeClaim,
    "Service": models.IoK8sApiCoreV1Service,
    "Job": models.IoK8sApiBatchV1Job,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
    "TrainJob": models.TrainerV1alpha1TrainJob,
}


def refused(manifest):
    """Return what the API server refuses: a wrong or missing value, or a field that is not in the schema."""
    try:
        parsed = MODELS[manifest["kind"]].from_dict(manifest)
    except ValueError as error:
        return str(error)
    return differences(manifest, parsed.to_dict()) or wrong_quantity(manifest)


def wrong_quantity(value, where="", expected=False):
    """Return the first amount of a resource that Kubernetes cannot parse; the models accept any string."""
    if isinstance(value, dict):
        inner = ((name, item, expected or name in ("requests", "limits", "sizeLimit")) for name, item in value.items())
        return next(filter(None, (wrong_quantity(item, f"{where}.{name}", found) for name, item, found in inner)), "")
    if isinstance(value, list):
        return next(filter(None, (wrong_quantity(item, f"{where}[{i}]", expected) for i, item in enumerate(value))), "")
    return f"{where}: {value!r} is no quantity" if expected and not re.fullmatch(QUANTITY, str(value)) else ""


def differences(given, kept, where=""):
    """Return the first place at which the model has not kept a value."""
    if isinstance(given, dict) and isinstance(kept, dict):
        found = (differences(value, kept.get(name), f"{where}.{name}") for name, value in given.items())
        return next(filter(None, found), "")
    if isinstance(given, list) and isinstance(kept, list):
        return next(filter(None, map(differences, given, kept, (f"{where}[{i}]" for i in range(len(given))))), "")
    return "" if given == kept else f"{where}: {given!r} is not in the schema"


@pytest.mark.parametrize(
    "manifest",
    [CLAIM, SERVICE, JOB, GPU_JOB, S3_JOB, RUNTIME, TRAINJOB],
    ids=["claim", "Service", "CPU", "GPU", "S3", "runtime", "TrainJob"],
)
def test_the_schema_accepts_the_manifest(manifest):
    assert refused(manifest) == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completion": 2}, ".spec.completion: 2 is not in the schema"),
        ({"completions": "2"}, "completions\n  Input should be a valid integer"),
        ({"template": {"spec": {}}}, "containers\n  Input should be a valid list"),
        (
            {"template": {"spec": {"containers": [{"name": "a", "arg": []}]}}},
            ".containers[0].arg: [] is not in the schema",
        ),
        (
            {"template": {"spec": {"containers": [{"name": "a", "resources": {"requests": {"memory": "4Gb"}}}]}}},
            ".containers[0].resources.requests.memory: '4Gb' is no quantity",
        ),
    ],
)
def test_a_wrong_manifest_is_refused(change, message):
    assert message in refused(JOB | {"spec": JOB["spec"] | change})


@pytest.mark.parametrize("text", ["2", "500m", "4Gi", "1.5", ".5G", "1e3", "-1E-3", "128974848"])
def test_quantities(text):
    assert wrong_quantity({"limits": {"memory": text}}) == ""


@pytest.mark.parametrize("text", ["", "4Gb", "4GiB", "4 Gi", "4g", "4K", "Gi", ".", "1e", "two"])
def test_wrong_quantities(text):
    for name in ("requests", "limits"):
        assert wrong_quantity([{name: {"memory": text}}]) == f"[0].{name}.memory: {text!r} is no quantity"
    assert wrong_quantity({"emptyDir": {"sizeLimit": text}}) == f".emptyDir.sizeLimit: {text!r} is no quantity"


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
def test_the_liveness_probe_fails_when_the_heartbeat_file_is_old(job, tmp_path):
    (word,) = (word for word in arguments_of(job) if word.startswith("distributed.heartbeat_file="))
    name = word.partition("=")[2]
    shell, option, script = container_of(job)["livenessProbe"]["exec"]["command"]
    file = tmp_path / "heartbeat"
    assert script.count(name) == 2

    def alive():
        return subprocess.run([shell, option, script.replace(name, str(file))], check=False).returncode == 0

    assert alive()  # before the first step, which may wait for other pods
    file.touch()
    assert alive()
    limits = load_config().distributed
    watchdog_s = max(limits.init_timeout_s, limits.step_timeout_s)
    os.utime(file, times=(0, time.time() - watchdog_s - 60))
    assert alive()  # the watchdog has not ended yet
    os.utime(file, times=(0, time.time() - 700))
    assert not alive()


@JOBS
def test_volumes(job):
    pod = job["spec"]["template"]["spec"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container_of(job)["volumeMounts"]}
    assert mounts == {"shared": "/shared", "shm": "/dev/shm"}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    claim = {"claimName": CLAIM["metadata"]["name"]}
    assert pod["volumes"][0].get("persistentVolumeClaim") == (None if job is S3_JOB else claim)
    assert CLAIM["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize("job", [JOB, GPU_JOB, S3_JOB], ids=["CPU", "GPU", "S3"])
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
    assert_trains(options, "s3://" if job is S3_JOB else "/shared/")


def test_the_patch_for_an_object_store_changes_only_the_directories():
    before, after = (torchrun_arguments(container_of(job)) for job in (JOB, S3_JOB))
    assert vars(after) | {"training_script_args": None} == vars(before) | {"training_script_args": None}
    config = load_config([], after.training_script_args)
    assert config.run.dir.startswith("s3://")
    volumes = {volume["name"]: volume for volume in S3_JOB["spec"]["template"]["spec"]["volumes"]}
    assert volumes["shared"] == {"name": "shared", "emptyDir": {}}
    assert config.run.local_dir.startswith("/shared/")
    assert config.data.root == load_config([], before.training_script_args).data.root


def assert_trains(options, directory="/shared/"):
    assert (options.rdzv_backend, options.max_restarts, options.module) == ("static", 0, True)
    assert options.training_script == "distlenet.train"
    config = load_config([], options.training_script_args)
    assert config.run.dir.startswith(directory)
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


def pytorchjob_variables(pod, pods, port):
    """Return what Kubeflow's PyTorchJob sets (training-operator, pkg/controller.v1/pytorch/envvar.go, since 1.7)."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    sizes = {"PET_NNODES": pods, "PET_NODE_RANK": pod, "PET_NPROC_PER_NODE": 1, "WORLD_SIZE": pods, "RANK": pod}
    variables = address | {f"PET_{name}": value for name, value in address.items()} | sizes
    return {name: str(value) for name, value in variables.items()}


def indexed_job_variables(pod, pods, port):
    """Return the variables of a pod of an Indexed Job without torchrun: its index, and what the manifest sets."""
    names = {"JOB_COMPLETION_INDEX": pod, "WORLD_SIZE": pods, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in names.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables_of", "launcher"),
    [(pytorchjob_variables, ("-m", "distlenet.launch")), (indexed_job_variables, ())],
    ids=["PyTorchJob", "Indexed Job"],
)
def test_pods_train_together(tmp_path, variables_of, launcher):
    port = free_port()
    settings = ("data.name=digits", "train.epochs=1", f"run.dir={tmp_path}", "run.name=run", "run.report=never")
    command = (sys.executable, *launcher, "-m", "distlenet.train", *settings)
    with contextlib.ExitStack() as stack:
        environments = [variables_of(pod, 2, port) for pod in range(2)]
        jobs = [stack.enter_context(Job(tmp_path, *command, env=variables)) for variables in environments]
        results = [job.wait().succeeded() for job in jobs]
    for text in ("world size 2, gloo", "epoch 1/1", "Accuracy of the network"):
        assert text in results[0].stdout
        assert text not in results[1].stdout  # torchrun may warn that the first agent has ended
