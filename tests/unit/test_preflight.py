"""Preflight's judgement of what ranks saw, fault by fault; several hosts are in tests/cluster/test_preflight.py."""

import json
import resource
import socket
import sys
from dataclasses import replace

import pytest
import torch
from torch.distributed import HashStore

from distlenet.config.loading import load_config
from distlenet.distributed.entry_point import run_entry
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.preflight import __main__ as preflight
from distlenet.preflight import rank_info as facts
from distlenet.preflight import rules as judge
from distlenet.preflight import run_dir as folder
from distlenet.preflight.allreduce import fit_line, rounds
from distlenet.preflight.ports import ALL_PAIRS, Listener, peers_of, try_peers

pytestmark = pytest.mark.unit

CONFIG = load_config([], ["data.name=digits", "device=cpu"])
ALONE = facts.look(CONFIG, DistributedEnvironment())


def ranks(number, per_node=2, **changes):
    """Make facts of ranks on nodes n0, n1, ..., all well."""
    made = []
    for rank in range(number):
        node, local = divmod(rank, per_node)
        place = {"rank": rank, "node_rank": node, "local_rank": local, "local_world_size": per_node, "cores": per_node}
        net = {
            "host": f"n{node}",
            "address": f"10.0.0.{node + 1}",
            "loopback": False,
            "interface": "eth0",
            "pinned": "",
        }
        made.append(replace(ALONE, **place, **net, threads=1, open_files=4096, shm_bytes=10**9, **changes))
    return made


def on_rank(made, rank, **changes):
    made[rank] = replace(made[rank], **changes)
    return made


def on_gpus(made, shared=()):
    return [
        replace(f, gpu=f"GPU-{0 if f.rank in shared else f.local_rank}", gpus=2, device="cuda:0", backend="nccl")
        for f in made
    ]


def judged(made, clocks=None, config=CONFIG):
    return {f.name: f for f in judge.judge(made, clocks or [0.0] * len(made), config, 10**6)}


def test_all_is_well():
    findings = judged(ranks(4))
    assert {f.status for f in findings.values()} == {"ok"}
    assert findings["names"].found == "n0 eth0 10.0.0.1, n1 eth0 10.0.0.2"


@pytest.mark.parametrize(
    ("name", "made", "found", "mend"),
    [
        (
            "versions",
            on_rank(ranks(4), 3, versions={**ALONE.versions, "torch": "9.9"}),
            "(ranks 0, 1, 2 on n0, n1), 9.9 (rank 3 on n1)",
            "the same environment on every node",
        ),
        ("settings", on_rank(ranks(2), 1, settings="other"), "other (rank 1 on n0)", "the same arguments"),
        ("devices", on_gpus(ranks(4), shared=(0, 1)), "ranks 0, 1 share one GPU, n0 GPU-0", "--gpus-per-task=1"),
        ("devices", on_rank(ranks(2), 1, refused="no GPU here"), "no GPU here (rank 1 on n0)", ""),
        ("devices", on_rank(on_gpus(ranks(4)), 3, gpu="", device="cpu", backend="gloo"), "cpu, gloo, fp32 (rank 3", ""),
        ("names", on_rank(ranks(4), 2, loopback=True, address="127.0.1.1"), "n1 resolves to 127.0.1.1", "IFNAME=eth0"),
        ("names", on_rank(ranks(4), 2, address=""), "its own name on n1", "GLOO_SOCKET_IFNAME=eth0"),
        ("names", on_rank(ranks(4), 2, address="", pinned="ib9"), "by GLOO_SOCKET_IFNAME=ib9 on n1", "IFNAME=eth0"),
        ("shared memory", on_rank(on_gpus(ranks(4)), 2, shm_bytes=6 * 10**6), "6 MB free on n1, its ranks", "-shm"),
        ("open files", on_rank(ranks(4), 1, open_files=256), "may have 256 on n0, 4 ranks need 264", "ulimit -n 264"),
    ],
)  # fmt: skip
def test_a_fault_is_named_with_its_mend(name, made, found, mend):
    findings = judged(made)
    assert findings[name].status == "FAIL"
    assert found in findings[name].found
    assert mend in findings[name].mend
    assert [f.name for f in findings.values() if f.status == "FAIL"] == [name]


def test_clocks():
    assert judged(ranks(4), [0.0, 0.1, -0.3, 0.2])["clocks"].found == "within 0.30 s"
    finding = judged(ranks(4), [0.0, 0.0, -7.25, 0.0])["clocks"]
    assert (finding.status, finding.found) == ("FAIL", "n1 is 7.2 s behind n0")


def test_workers_need_shared_memory():
    config = load_config([], ["data.num_workers=300"])
    assert "its ranks need 1,200 MB" in judged(ranks(2), config=config)["shared memory"].found


def test_what_stops_no_job_is_a_note():
    assert judged(on_rank(ranks(2), 0, cores=1))["processors"].status == "note"
    idle = [replace(f, gpus=8) for f in ranks(2)]
    assert judged(idle)["devices"].found == "GPUs stand idle on n0"
    trapped = on_rank(on_gpus(ranks(4)), 2, loopback=True, address="127.0.1.1")
    assert judged(trapped)["names"].status == "ok"  # NCCL looks for interfaces by itself


def test_one_node_may_have_any_name():
    assert judged(on_rank(ranks(2), 0, loopback=True, address="127.0.1.1"))["names"].status == "ok"


@pytest.mark.parametrize("nodes", [2, 3, ALL_PAIRS, ALL_PAIRS + 1, 100])
def test_every_node_is_tried(nodes):
    tried = [peers_of(node, nodes) for node in range(nodes)]
    assert all(node not in peers for node, peers in enumerate(tried))
    assert {peer for peers in tried for peer in peers} == set(range(nodes))
    assert sum(map(len, tried)) <= nodes * ALL_PAIRS


def test_peers_that_answer_and_that_do_not():
    store = HashStore()
    listener = Listener("127.0.0.1", "the word")
    closed = socket.create_server(("127.0.0.1", 0))
    port = closed.getsockname()[1]
    closed.close()
    for node, (at, word) in enumerate([(listener.port, "the word"), (port, "x"), (listener.port, "another")]):
        store.set(f"listen/{node}", f"n{node} 127.0.0.1 {at} {word}")
    store.set("listen/3", "n3 - - Cannot assign requested address")
    assert try_peers(store, [0, 1, 2, 3], 5.0) == [
        f"n1 (127.0.0.1 port {port}): Connection refused",
        f"n2 (127.0.0.1 port {listener.port}): something else answers there",
        "n3 cannot listen: Cannot assign requested address",
    ]
    listener.close()


@pytest.mark.parametrize("players", range(2, 9))
def test_each_meets_each_once_and_nobody_two_at_a_time(players):
    played = rounds(range(players))
    assert all(len({p for pair in pairs for p in pair}) == 2 * len(pairs) for pairs in played)
    games = [pair for pairs in played for pair in pairs]
    assert sorted(games) == [(a, b) for a in range(players) for b in range(a + 1, players)]


def test_a_line_is_fitted():
    intercept, slope = fit_line([1, 10, 100], [5.2, 7, 25])
    assert (intercept, slope) == (pytest.approx(5), pytest.approx(0.2))


def test_a_line_has_no_negative_part():
    intercept, slope = fit_line([1, 10, 100], [1, 10.5, 110])
    assert intercept == 0
    assert 1 < slope < 1.1


def test_room_is_for_the_checkpoints_that_are_kept(tmp_path, monkeypatch):
    config = load_config([], [f"run.dir={tmp_path}", "checkpoint.keep_last=4"])
    size = folder.checkpoint_bytes(config)
    usage = type("Usage", (), {"free": 6 * size})
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: usage)
    assert folder.room(config) == ""
    usage.free -= 1
    assert "6 checkpoints take 3.9 MB" in folder.room(config)


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["preflight", *words])
    preflight.main()


def test_alone(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "data.name=digits", "device=cpu", f"run.dir={tmp_path}/runs", "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["good"]
    assert [check["name"] for check in report["checks"]][-2:] == ["data", "training step"]
    assert not list(tmp_path.iterdir())  # as it was
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["data.name=mnist", "data.root=none"], "FAIL  data            "),
        (["data.name=digits", "run.dir=/proc/runs"], "FAIL  run folder      /proc/runs cannot be written"),
        (["data.name=digits", "checkpoint.keep_last=1000000000"], "FAIL  room            "),
        (["data.name=digits", "distributed.backend=nccl"], "FAIL  devices         distributed.backend=nccl"),
        (["data.name=digits", "train.global_batch_size=3", "train.accumulation_steps=2"], "FAIL  training        "),
    ],
)
def test_a_fault_alone(monkeypatch, tmp_path, capsys, words, line):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_entry(lambda: run(monkeypatch, "device=cpu", *words))
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert next(text for text in told.out.splitlines() if text.startswith("FAIL")).startswith(line), told.out
    assert told.out.splitlines()[-1].endswith("a job would not start")
    assert told.err.startswith("distlenet: preflight: 1 of ")


@pytest.mark.parametrize(
    ("words", "environ", "found"),
    [
        (["optim.lr=fast"], {}, "optim.lr=fast: expected a number"),
        ([], {"RANK": "0"}, "environment: RANK is set, but not LOCAL_RANK"),
    ],
)
def test_who_reads_json_reads_of_bad_settings_too(monkeypatch, capsys, words, environ, found):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        run_entry(lambda: run(monkeypatch, "--json", *words))
    assert ended.value.code == 2
    told = capsys.readouterr()
    report = json.loads(told.out)
    assert not report["good"]
    (check,) = report["checks"]
    assert (check["name"], check["status"]) == ("settings", "FAIL")
    assert check["found"].startswith(found)
    assert found in told.err


def test_limits_of_this_process_are_seen():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        assert facts.look(CONFIG, DistributedEnvironment()).open_files == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_interface_that_reaches_a_host():
    assert facts.interface_to("127.0.0.1") == "lo"
    assert facts.own_address("lo") == ("127.0.0.1", True)
    assert facts.own_address("nosuch0") == ("", False)
    assert facts.interface_to("no.such.host.invalid") == ""
