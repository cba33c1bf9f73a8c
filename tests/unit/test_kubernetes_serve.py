"""The manifests that serve a model: their schema, and the numbers and names that must agree.

kubernetes_schemas.json has the schemas of a Deployment (Kubernetes 1.37) and of an InferenceService (KServe 0.20), cut
to the objects that the manifests have: other fields of these objects are only named, in "others". The package
kubeflow-trainer-api has pydantic models of the pod and of the Service.
"""

import json
import re
import tomllib

import pytest
from conftest import REPO
from kubeflow_trainer_api import models
from test_kubernetes import CLAIM, differences, objects, wrong_quantity

from distlenet.export.triton import write_triton
from distlenet.serve.__main__ import make_parser

pytestmark = pytest.mark.unit

SCHEMAS = json.loads((REPO / "tests/unit/kubernetes_schemas.json").read_text())
SERVICE, DEPLOYMENT = objects("serve.yaml")
CUSTOM, TRITON = objects("inference_service.yaml")
TYPES = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}


def refused(value, schema, where=""):
    """Return the first place at which a value does not follow a schema, or an empty string."""
    types = schema.get("type", [])
    classes = tuple(TYPES[name] for name in ([types] if isinstance(types, str) else types))
    if classes and (not isinstance(value, classes) or (isinstance(value, bool) and bool not in classes)):
        return f"{where}: {value!r} is no {types}"
    if value not in schema.get("enum", [value]):
        return f"{where}: {value!r} is not allowed"
    if isinstance(value, list):
        return next(filter(None, (refused(item, schema.get("items", {}), f"{where}[]") for item in value)), "")
    if not isinstance(value, dict) or "properties" not in schema:
        return ""
    if missing := [name for name in schema.get("required", ()) if name not in value]:
        return f"{where}: {missing} is missing"
    known = schema["properties"] | {name: {} for name in schema.get("others", "").split()}
    if unknown := value.keys() - known.keys():
        return f"{where}: {sorted(unknown)} is not in the schema"
    return next(filter(None, (refused(item, known[name], f"{where}.{name}") for name, item in value.items())), "")


@pytest.mark.parametrize("manifest", [DEPLOYMENT, CUSTOM, TRITON], ids=["Deployment", "custom", "Triton"])
def test_the_schema_accepts_the_manifest(manifest):
    assert refused(manifest, SCHEMAS[manifest["kind"]]) == ""
    assert wrong_quantity(manifest) == ""


@pytest.mark.parametrize(
    ("manifest", "change", "message"),
    [
        (DEPLOYMENT, {"replica": 2}, ".spec: ['replica'] is not in the schema"),
        (DEPLOYMENT, {"replicas": "2"}, ".spec.replicas: '2' is no integer"),
        (CUSTOM, {"predictor": {"containers": [{"image": "x"}]}}, ".spec.predictor.containers[]: ['name'] is missing"),
        (
            TRITON,
            {"predictor": {"model": {"modelFormat": {}}}},
            ".spec.predictor.model.modelFormat: ['name'] is missing",
        ),
    ],
)
def test_a_wrong_manifest_is_refused(manifest, change, message):
    assert message in refused(manifest | {"spec": manifest["spec"] | change}, SCHEMAS[manifest["kind"]])


def test_the_pod_and_the_service_follow_the_models():
    for manifest, model in (
        (SERVICE, models.IoK8sApiCoreV1Service),
        (DEPLOYMENT["spec"]["template"], models.IoK8sApiCoreV1PodTemplateSpec),
    ):
        assert differences(manifest, model.from_dict(manifest).to_dict()) == ""


POD = DEPLOYMENT["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
(PREDICTOR,) = CUSTOM["spec"]["predictor"]["containers"]
CONTAINERS = pytest.mark.parametrize("container", [CONTAINER, PREDICTOR], ids=["Deployment", "KServe"])


def arguments_of(container):
    assert container["args"][0] == "serve"
    return make_parser().parse_args(container["args"][1:])


@CONTAINERS
def test_the_arguments_agree_with_the_pod(container):
    arguments = arguments_of(container)
    assert arguments.host == "0.0.0.0"
    assert [port["containerPort"] for port in container["ports"]] == [arguments.port]
    assert arguments.threads == int(container["resources"]["requests"]["cpu"])  # not all cores of the node
    port = container["readinessProbe"]["httpGet"]["port"]
    assert port in (arguments.port, container["ports"][0]["name"])


def test_a_pod_that_stops_answers_until_the_service_has_removed_it():
    arguments, probe = arguments_of(CONTAINER), CONTAINER["readinessProbe"]
    unready_s = (probe["failureThreshold"] + 1) * probe["periodSeconds"]  # until the probe has failed, at most
    assert unready_s < arguments.drain_s
    assert POD["terminationGracePeriodSeconds"] > arguments.drain_s + arguments.grace_s
    assert arguments_of(PREDICTOR).drain_s + arguments_of(PREDICTOR).grace_s < 30  # the default grace period


def test_the_probes_ask_paths_that_need_no_token():
    paths = {name: CONTAINER[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert [probe["path"] for probe in paths.values()] == ["/readyz", "/readyz", "/healthz"]
    assert {probe["port"] for probe in paths.values()} == {CONTAINER["ports"][0]["name"]}


@CONTAINERS
def test_the_container_can_change_nothing_but_its_temporary_files(container):
    security = container["securityContext"]
    assert (security["readOnlyRootFilesystem"], security["allowPrivilegeEscalation"]) == (True, False)
    assert security["capabilities"] == {"drop": ["ALL"]}
    writable = [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
    assert writable == ["/tmp"]
    assert (security if container is PREDICTOR else POD["securityContext"])["runAsNonRoot"]


def test_volumes_and_names():
    mounts = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    assert mounts.keys() == volumes.keys()
    arguments = arguments_of(CONTAINER)
    assert str(arguments.model).startswith(mounts["models"] + "/")
    assert arguments.token_file.parent.as_posix() == mounts["token"]
    assert volumes["models"]["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
    text = (REPO / "launch/kubernetes/serve.yaml").read_text()
    secret = re.search(r"create secret generic (\S+) --from-literal=(\w+)=", text)
    assert (secret[1], secret[2]) == (volumes["token"]["secret"]["secretName"], arguments.token_file.name)
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert SERVICE["spec"]["selector"] == DEPLOYMENT["spec"]["selector"]["matchLabels"] == labels
    assert SERVICE["spec"]["ports"][0]["targetPort"] == CONTAINER["ports"][0]["name"]


def test_kserve_finds_the_model_on_the_volume(tmp_path):
    (uri,) = [variable["value"] for variable in PREDICTOR["env"] if variable["name"] == "STORAGE_URI"]
    repository = TRITON["spec"]["predictor"]["model"]["storageUri"]
    assert uri.startswith(f"pvc://{CLAIM['metadata']['name']}/")
    (tmp_path / "model.onnx").touch()
    write_triton(
        tmp_path,
        {"name": "x", "inputs": {}, "outputs": {"predictions": {"dtype": "bool", "shape": [None]}}, "classes": None},
    )
    (written,) = [path.name for path in tmp_path.iterdir() if path.is_dir()]
    assert repository == f"{uri}/1/{written}"
    assert arguments_of(PREDICTOR).name == CUSTOM["metadata"]["name"]


def test_the_image_has_the_packages_of_serve_and_no_torch():
    text = (REPO / "launch/Containerfile").read_text()
    (stage,) = re.findall(r"^FROM \S+ AS serve\n(.*?)^FROM", text, re.M | re.S)
    installed = set(re.findall(r"[a-z0-9-]+", re.search(r"pip install --no-cache-dir (numpy .*)", stage)[1]))
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in project["optional-dependencies"]["serve"]}
    assert installed == names | {"numpy", "pillow"}
    assert "pip install --no-cache-dir --no-deps /wheel/*.whl" in stage
