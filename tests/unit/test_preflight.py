"""The rules and parts of preflight in one process; tests/cluster/test_preflight.py runs it on several hosts."""

import json
import resource
import socket
import sys
from dataclasses import replace

import pytest
import torch
from torch.distributed import HashStore

from distlenet.config.loading import load_config
from distlenet.config.schema import Config
from distlenet.distributed.device import DeviceChoice
from distlenet.distributed.entry_point import run_entry
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.preflight import __main__ as preflight
from distlenet.preflight import trial_step
from distlenet.preflight.allreduce import fit_line, tournament_rounds
from distlenet.preflight.exchange import clock_offset
from distlenet.preflight.node_checks import check_run_dir, remove_if_created
from distlenet.preflight.ports import ALL_PAIRS_LIMIT, peers_of, publish_listener, try_peers
from distlenet.preflight.rank_info import collect_rank_info, own_address, route_to
from distlenet.preflight.rules import apply_rules
from distlenet.preflight.trial_step import check_disk_space
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

HOST = socket.gethostname()
CONFIG = load_config([], ["data.name=digits", "device=cpu"])
SINGLE = collect_rank_info(CONFIG, DistributedEnvironment(), DeviceChoice("cpu"))


def make_ranks(number, per_node=2, **changes):
    """Return the RankInfo of healthy ranks on nodes n0, n1, ..."""
    infos = []
    for rank in range(number):
        node, local_rank = divmod(rank, per_node)
        position = {"rank": rank, "node_rank": node, "local_rank": local_rank, "local_world_size": per_node}
        network = {"host": f"n{node}", "address": f"10.0.0.{node + 1}", "interface": "eth0", "socket_ifname": ""}
        limits = {"cores": per_node, "threads": 1, "open_files": 4096, "shm_bytes": 10**9}
        infos.append(replace(SINGLE, **position, **network, **limits, **changes))
    return infos


def change(infos, rank, **changes):
    infos[rank] = replace(infos[rank], **changes)
    return infos


def with_gpus(infos):
    return [replace(i, visible_gpus=2, device=f"cuda:{i.local_rank}", backend="nccl") for i in infos]


def findings_of(infos, clocks=None, config=CONFIG):
    return {f.name: f for f in apply_rules(infos, clocks or [0.0] * len(infos), config)}


def test_healthy_ranks_pass_all_rules():
    findings = findings_of(make_ranks(4))
    assert {f.status for f in findings.values()} == {"ok"}
    assert findings["names"].found == "n0 eth0 10.0.0.1, n1 eth0 10.0.0.2"


@pytest.mark.parametrize(
    ("name", "infos", "found", "hint"),
    [
        (
            "versions",
            change(make_ranks(4), 3, versions={**SINGLE.versions, "torch": "9.9"}),
            "(ranks 0, 1, 2 on n0, n1), 9.9 (rank 3 on n1)",
            "the same environment on every node",
        ),
        ("settings", change(make_ranks(2), 1, settings="other"), "other (rank 1 on n0)", "the same arguments"),
        ("devices", change(make_ranks(2), 1, device_error="no GPU"), "no GPU (rank 1 on n0)", ""),
        (
            "devices",
            change(with_gpus(make_ranks(4)), 3, device="cpu", backend="gloo"),
            "cpu, gloo, fp32 (rank 3",
            "make all GPUs visible",
        ),
        ("names", change(make_ranks(4), 2, address="127.0.1.1"), "n1 resolves to 127.0.1.1", "IFNAME=eth0"),
        ("names", change(make_ranks(4), 2, address=""), "the host name has no address on n1", "IFNAME=eth0"),
        (
            "names",
            change(make_ranks(4), 2, address="", socket_ifname="ib9"),
            "GLOO_SOCKET_IFNAME=ib9 has no address on n1",
            "IFNAME=eth0",
        ),
        (
            "shared memory",
            change(with_gpus(make_ranks(4)), 2, shm_bytes=6 * 10**6),
            "6 MB free on n1, its ranks need 67 MB",
            "--shm-size",
        ),
        ("open files", change(make_ranks(4), 1, open_files=256), "256 on n0, 4 ranks need 264", "ulimit -n 264"),
    ],
)
def test_rules_name_the_fault_and_the_fix(name, infos, found, hint):
    findings = findings_of(infos)
    assert findings[name].status == "FAIL"
    assert found in findings[name].found
    assert hint in findings[name].hint
    assert [f.name for f in findings.values() if f.status == "FAIL"] == [name]


def test_clocks():
    assert findings_of(make_ranks(4), [0.0, 0.1, -0.3, 0.2])["clocks"].found == "within 0.30 s"
    finding = findings_of(make_ranks(4), [0.0, 0.0, -7.25, 0.0])["clocks"]
    assert (finding.status, finding.found) == ("FAIL", "n1 is 7.2 s behind n0")


def test_ranks_of_one_node_may_read_its_clock_at_different_times():
    finding = findings_of(make_ranks(4), [0.0, 1.5, 0.2, 9.0])["clocks"]
    assert (finding.status, finding.found) == ("ok", "within 0.20 s")


def test_a_node_that_reads_its_clock_late_is_not_ahead():
    """Rank 0 asks for the clocks when its own shows 100 s, and has all of them at 107 s."""
    assert [clock_offset(clock, 100.0, 107.0) for clock in (100.1, 106.5, 400.0, 95.0)] == [0.0, 0.0, 293.0, -5.0]


def test_loader_workers_need_shared_memory():
    config = load_config([], ["data.num_workers=300", "train.global_batch_size=2000"])
    assert "its ranks need 1,229 MB" in findings_of(make_ranks(2), config=config)["shared memory"].found


def test_findings_that_do_not_stop_a_job():
    assert findings_of(change(make_ranks(2), 0, cores=1))["CPU cores"].status == "note"
    devices = findings_of([replace(i, visible_gpus=8) for i in make_ranks(2)])["devices"]
    assert (devices.status, devices.found) == ("note", "GPUs are not used on n0")
    shared = findings_of(make_ranks(2, device_warning="2 ranks on n0 share 1 GPU", visible_gpus=1))["devices"]
    assert (shared.status, shared.found) == ("note", "2 ranks on n0 share 1 GPU")
    loopback = change(with_gpus(make_ranks(4)), 2, address="127.0.1.1")
    assert findings_of(loopback)["names"].status == "ok"  # NCCL chooses interfaces itself


def test_a_single_node_may_have_a_loopback_name():
    assert findings_of(change(make_ranks(2), 0, address="127.0.1.1"))["names"].status == "ok"


@pytest.mark.parametrize("num_nodes", [2, 3, ALL_PAIRS_LIMIT, ALL_PAIRS_LIMIT + 1, 100])
def test_every_node_is_a_peer_of_another(num_nodes):
    peers = [peers_of(node, num_nodes) for node in range(num_nodes)]
    assert all(node not in peers[node] for node in range(num_nodes))
    assert {peer for of_node in peers for peer in of_node} == set(range(num_nodes))
    assert sum(map(len, peers)) <= num_nodes * ALL_PAIRS_LIMIT


def test_try_peers_names_the_failed_connections():
    store = HashStore()
    publish_listener(store, 0, "no address")
    listener = publish_listener(store, 1, "127.0.0.1")
    host, _, port, _ = json.loads(store.get("listener/1"))
    closed = socket.create_server(("127.0.0.1", 0))
    closed_port = closed.getsockname()[1]
    closed.close()
    store.set("listener/2", json.dumps(["n2", "127.0.0.1", closed_port, "nonce"]))
    store.set("listener/3", json.dumps(["n3", "127.0.0.1", port, "another nonce"]))
    cannot_listen, *failures = try_peers(store, [0, 1, 2, 3])
    listener.close()
    assert cannot_listen.startswith(f"{host} (cannot listen at no address): ")
    assert failures == [
        f"n2 (127.0.0.1 port {closed_port}): Connection refused",
        f"n3 (127.0.0.1 port {port}): another program answers on this port",
    ]


@pytest.mark.parametrize("players", range(2, 9))
def test_tournament_rounds_pair_all_players_once(players):
    rounds = tournament_rounds(range(players))
    assert all(len({player for pair in pairs for player in pair}) == 2 * len(pairs) for pairs in rounds)
    assert sorted(pair for pairs in rounds for pair in pairs) == [
        (a, b) for a in range(players) for b in range(a + 1, players)
    ]


def test_fit_line():
    assert fit_line([1, 10, 100], [5.2, 7, 25]) == pytest.approx((5, 0.2))
    assert fit_line([100], [25]) == (0, 0.25)  # a single size, without a warning of numpy


def test_fit_line_has_no_negative_part():
    intercept, slope = fit_line([1, 10, 100], [1, 10.5, 110])
    assert intercept == 0
    assert 1 < slope < 1.1
    assert fit_line([1, 10, 100], [5, 4, 3]) == pytest.approx((3.75, 0), rel=0.1)


def test_disk_space_for_the_kept_checkpoints():
    config = load_config([], ["checkpoint.keep_last=4"])
    assert check_disk_space(config, checkpoint_bytes=10**6, free_bytes=6 * 10**6).status == "ok"
    finding = check_disk_space(config, checkpoint_bytes=10**6, free_bytes=6 * 10**6 - 1)
    assert (finding.status, finding.found) == ("FAIL", "runs has 6.0 MB free, 6 checkpoints take 6.0 MB")


def test_created_directories_are_removed_if_empty(tmp_path):
    run_dir = tmp_path / "new/runs"
    with remove_if_created(run_dir):
        run_dir.mkdir(parents=True)
    assert not list(tmp_path.iterdir())
    with remove_if_created(run_dir):
        run_dir.mkdir(parents=True)
        (run_dir / "file").touch()
    assert (run_dir / "file").exists()


def test_a_run_directory_that_cannot_be_created_is_reported_with_the_reason(monkeypatch, tmp_path):
    def refuse(path, exist_ok):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.makedirs", refuse)
    run_dir = tmp_path / "runs"
    assert check_run_dir(run_dir, "", create=True) == f"{run_dir} cannot be written: Permission denied"
    assert check_run_dir(tmp_path, "", create=False) == ""


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["preflight", *arguments])
    preflight.main()


def test_a_single_process(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "data.name=digits", "device=cpu", f"run.dir={tmp_path}/runs", "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["good"]
    assert [check["name"] for check in report["checks"]][-2:] == ["training step", "disk space"]
    assert not list(tmp_path.iterdir())
    assert not torch.distributed.is_initialized()


def test_the_datasets_of_a_task_that_does_not_use_the_images(monkeypatch, tmp_path, capsys):
    settings = ["task.name=prove_tasks:Correct", "train.global_batch_size=8"]
    run(monkeypatch, *settings, "device=cpu", f"run.dir={tmp_path}/runs", "--json")
    checks = {check["name"]: check["found"] for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["data"] == "train: Points, 96 samples; test: Points, 40 samples"
    assert "fashion_mnist" not in str(checks)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["data.name=mnist", "data.root=none"], "FAIL  data            "),
        (["data.name=digits", "run.dir=/proc/runs"], f"FAIL  run directory   {HOST}: /proc/runs cannot be written"),
        (["data.name=digits", "checkpoint.keep_last=1000000000"], "FAIL  disk space      "),
        (["data.name=digits", "distributed.backend=nccl"], "FAIL  devices         distributed.backend=nccl"),
        (["data.name=digits", "train.global_batch_size=3", "train.accumulation_steps=2"], "FAIL  training        "),
    ],
)
def test_a_fault_in_a_single_process(monkeypatch, tmp_path, capsys, arguments, line):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        run_entry(lambda: run(monkeypatch, "device=cpu", *arguments))
    assert exit_info.value.code == 2
    output = capsys.readouterr()
    assert next(text for text in output.out.splitlines() if text.startswith("FAIL")).startswith(line), output.out
    assert output.out.splitlines()[-1].endswith("a job would not start")
    assert output.err.startswith("distlenet: preflight: 1 of ")


@pytest.mark.parametrize(
    ("arguments", "environ", "found"),
    [
        (["optim.lr=fast"], {}, "optim.lr=fast: expected a number"),
        ([], {"RANK": "0"}, "environment: RANK is set, but not LOCAL_RANK"),
    ],
)
def test_json_reports_invalid_settings(monkeypatch, capsys, arguments, environ, found):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as exit_info:
        run_entry(lambda: run(monkeypatch, "--json", *arguments))
    assert exit_info.value.code == 2
    output = capsys.readouterr()
    report = json.loads(output.out)
    assert not report["good"]
    (check,) = report["checks"]
    assert (check["name"], check["status"]) == ("settings", "FAIL")
    assert check["found"].startswith(found)
    assert found in output.err


def test_rank_info_contains_the_limits_of_this_process():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        assert collect_rank_info(CONFIG, DistributedEnvironment(), DeviceChoice("cpu")).open_files == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_addresses_and_interfaces():
    assert route_to("127.0.0.1") == ("127.0.0.1", "lo")
    assert own_address("lo") == "127.0.0.1"
    assert own_address("nosuch0") == ""
    assert route_to("no.such.host.invalid") == route_to("") == ("", "")


def test_the_trial_step_builds_no_cache(monkeypatch):
    def stop(config: Config) -> None:
        raise UserError(f"{config.data.build_cache}")

    monkeypatch.setattr(trial_step, "make_task", stop)
    with pytest.raises(UserError, match="False"):
        trial_step.take_trial_step(CONFIG, None)
