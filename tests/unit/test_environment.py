"""The environment of torchrun, srun, mpirun, a pod of Kubernetes and a single process, and its errors."""

import re

import pytest

from distlenet.distributed.environment import (
    DistributedEnvironment,
    read_environment,
    slurm_first_host,
    slurm_port,
    slurm_tasks_per_node,
    threads_from_environ,
)
from distlenet.utils.errors import RankError, UserError

pytestmark = pytest.mark.unit


def variables(text: str) -> dict[str, str]:
    return dict(word.split("=") for word in text.split())


TORCHRUN = variables(
    "RANK=5 LOCAL_RANK=1 WORLD_SIZE=8 LOCAL_WORLD_SIZE=4 GROUP_RANK=1 MASTER_ADDR=n1 MASTER_PORT=29500 "
    "TORCHELASTIC_USE_AGENT_STORE=True"
)
SRUN = variables(
    "SLURM_JOB_ID=17 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=3 SLURM_STEP_TASKS_PER_NODE=2,1 SLURM_STEP_NODELIST=n[1-2] "
    "SLURM_PROCID=2 SLURM_LOCALID=0 SLURM_NODEID=1"
)


def test_torchrun():
    expected = DistributedEnvironment(5, 1, 8, 4, 1, "n1", 29500, agent_store=True)
    assert read_environment(TORCHRUN) == expected
    assert read_environment({**SRUN, **TORCHRUN}) == expected  # it has precedence


def test_ranks_started_by_hand_use_a_store_in_rank_0():
    by_hand = {k: v for k, v in TORCHRUN.items() if k not in ("TORCHELASTIC_USE_AGENT_STORE", "GROUP_RANK")}
    assert read_environment(by_hand) == DistributedEnvironment(5, 1, 8, 4, 1, "n1", 29500)


def test_srun():
    assert read_environment(SRUN) == DistributedEnvironment(2, 0, 3, 1, 1, "n1", slurm_port(SRUN))


def test_srun_with_an_arbitrary_distribution_needs_an_address():
    arbitrary = {**SRUN, "SLURM_DISTRIBUTION": "arbitrary"}
    with pytest.raises(UserError, match="set MASTER_ADDR"):
        read_environment(arbitrary)
    assert read_environment({**arbitrary, "MASTER_ADDR": "n2"}).master_addr == "n2"


def test_srun_uses_the_address_that_the_user_sets():
    given = {**SRUN, "MASTER_ADDR": "login", "MASTER_PORT": "1234"}
    env = read_environment(given)
    assert (env.master_addr, env.master_port) == ("login", 1234)


def test_a_single_task_has_no_address():
    """As in the interactive step of an salloc shell, even if the job is on many nodes."""
    alone = variables("SLURM_STEP_NUM_TASKS=1 SLURM_STEP_TASKS_PER_NODE=1 SLURM_PROCID=0 SLURM_NODEID=0")
    interactive = variables("SLURM_STEP_ID=4294967290 SLURM_DISTRIBUTION=arbitrary")
    assert read_environment({**SRUN, **alone, **interactive}) == DistributedEnvironment()


def test_a_job_of_a_federation_has_an_id_of_32_bits():
    assert 20_000 <= read_environment({**SRUN, "SLURM_JOB_ID": "4227858433"}).master_port < 30_000


def test_a_single_process_without_a_launcher():
    assert read_environment({"HOME": "/", "PATH": "/bin"}) == DistributedEnvironment(0, 0, 1, 1, 0)


def test_a_batch_script_is_a_single_process():
    """SLURM sets SLURM_PROCID=0 and SLURM_NTASKS there too, but only a job step has started tasks."""
    batch = "SLURM_JOB_ID=17 SLURM_NTASKS=4 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0"
    assert read_environment(variables(batch)) == DistributedEnvironment()


@pytest.mark.parametrize("name", sorted(TORCHRUN.keys() - {"GROUP_RANK", "TORCHELASTIC_USE_AGENT_STORE"}))
def test_a_missing_variable_is_named(name):
    with pytest.raises(UserError, match=rf"is set, but not .*\b{name}\b"):
        read_environment({k: v for k, v in TORCHRUN.items() if k != name})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"LOCAL_WORLD_SIZE": "9"}, "9 ranks on this node (LOCAL_WORLD_SIZE), but 8 in all"),
        ({"MASTER_ADDR": ""}, "but not MASTER_ADDR"),
        ({"RANK": "8"}, "rank 8 of 8 ranks"),
        ({"RANK": "x"}, "RANK='x': expected an integer"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT='65536': expected an integer, 1 to 65535"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE='-1'"),
        ({"LOCAL_RANK": "4"}, "local rank 4 of 4 ranks"),
        ({"LOCAL_WORLD_SIZE": ""}, "but not LOCAL_WORLD_SIZE"),
    ],
)
def test_invalid_and_contradicting_variables_are_named(change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read_environment({**TORCHRUN, **change})


@pytest.mark.parametrize(("text", "counts"), [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("1,2(x2)", [1, 2, 2])])
def test_tasks_per_node(text, counts):
    assert slurm_tasks_per_node(text, 99) == counts


@pytest.mark.parametrize("text", ["", "x", "2(x", "2,", "(x2)"])
def test_invalid_tasks_per_node(text):
    with pytest.raises(UserError, match="SLURM_STEP_TASKS_PER_NODE"):
        slurm_tasks_per_node(text, 99)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-4]", "n1"),
        ("gpu[03-07,11],login1", "gpu03"),
        ("gpu[3,5-7]", "gpu3"),
        ("rack[1-2]node[05-06]", "rack1node05"),
        ("a-b.example.org", "a-b.example.org"),
        ("n[1-2]-ib", "n1-ib"),
    ],
)
def test_first_host_of_a_node_list(nodes, first):
    assert slurm_first_host(nodes) == first


def test_ports_of_jobs_and_steps_differ_and_are_below_the_ephemeral_range():
    jobs = [(job, step) for job in range(1000, 1200) for step in range(10)]
    ports = {slurm_port({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}) for job, step in jobs}
    assert len(ports) == len(jobs)
    assert ports <= set(range(20_000, 30_000))


def test_the_list_of_tasks_per_node_is_limited():
    """``2(x999999999)`` would need 8 GB."""
    with pytest.raises(RankError, match="more nodes than the 8 tasks"):
        slurm_tasks_per_node("2(x999999999)", 8)


@pytest.mark.parametrize(("text", "threads"), [("4", 4), ("4,2", 4), (" 3 ", 3)])
def test_threads(text, threads):
    assert threads_from_environ({"OMP_NUM_THREADS": text}) == threads
    assert threads_from_environ({}) is None


@pytest.mark.parametrize("text", ["", "abc", "-3", "0", "99999", "2x"])
def test_invalid_threads(text):
    with pytest.raises(RankError, match="OMP_NUM_THREADS"):
        threads_from_environ({"OMP_NUM_THREADS": text})


OPEN_MPI = variables(
    "OMPI_COMM_WORLD_RANK=2 OMPI_COMM_WORLD_LOCAL_RANK=0 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_SIZE=2"
)
HYDRA = variables("PMI_RANK=2 MPI_LOCALRANKID=0 PMI_SIZE=4 MPI_LOCALNRANKS=2")
ADDRESS = {"MASTER_ADDR": "n0", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("ranks", [OPEN_MPI, HYDRA], ids=["Open MPI", "Hydra"])
def test_mpirun(ranks):
    expected = DistributedEnvironment(2, 0, 4, 2, 1, "n0", 29500)
    assert read_environment(ranks | ADDRESS) == expected
    assert read_environment(SRUN | ranks | ADDRESS) == expected  # srun has started mpirun's daemon on this node
    assert read_environment(TORCHRUN | ranks) == read_environment(TORCHRUN)


def test_srun_with_pmi2():
    """It sets the rank and the size as Hydra does, but not the local rank."""
    assert read_environment(SRUN | variables("PMI_RANK=2 PMI_SIZE=3 PMI_FD=9")) == read_environment(SRUN)


def test_a_single_rank_of_mpirun_needs_no_address():
    for alone in (
        "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_LOCAL_RANK=0 OMPI_COMM_WORLD_SIZE=1 OMPI_COMM_WORLD_LOCAL_SIZE=1",
        "PMI_RANK=0 MPI_LOCALRANKID=0 PMI_SIZE=1 MPI_LOCALNRANKS=1",
    ):
        assert read_environment(variables(alone)) == DistributedEnvironment()


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            OPEN_MPI,
            "SIZE=4, but MASTER_ADDR, MASTER_PORT is not set: mpirun sets none; give the host of rank 0 and a free "
            "port: mpirun -x MASTER_ADDR=HOST",
        ),
        (HYDRA | {"MASTER_ADDR": "n0"}, "PMI_SIZE=4, but MASTER_PORT is not set"),
        (HYDRA, "mpirun -genv MASTER_ADDR HOST -genv MASTER_PORT 29500"),
        (HYDRA | ADDRESS | {"MPI_LOCALNRANKS": "0"}, "MPI_LOCALNRANKS='0': expected an integer, 1 to"),
        (variables("PMI_RANK=0 PMI_SIZE=2"), "PMI_RANK is set, but not MPI_LOCALRANKID, MPI_LOCALNRANKS; start ranks"),
        (OPEN_MPI | ADDRESS | {"OMPI_COMM_WORLD_RANK": "1"}, "ranks of a node do not follow each other"),
        (OPEN_MPI | ADDRESS | {"OMPI_COMM_WORLD_SIZE": "5"}, "nodes have unequal numbers of ranks"),
        (OPEN_MPI | ADDRESS | {"OMPI_COMM_WORLD_RANK": "4"}, "rank 4 of 4 ranks"),
    ],
)
def test_mpirun_reports_what_is_missing(environ, message):
    with pytest.raises(RankError, match=re.escape(message)):
        read_environment(environ)


POD = {"JOB_COMPLETION_INDEX": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "net-0.net", "MASTER_PORT": "29500"}
"""A pod of a Kubernetes Indexed Job that runs distlenet without torchrun."""


def test_a_pod_of_an_indexed_job_is_one_rank():
    assert read_environment(POD) == DistributedEnvironment(1, 0, 2, 1, 1, "net-0.net", 29500)
    assert read_environment(POD | {"JOB_COMPLETION_INDEX": "0"}).rank == 0


@pytest.mark.parametrize("ranks", [TORCHRUN, OPEN_MPI | ADDRESS, HYDRA | ADDRESS, SRUN])
def test_ranks_that_a_launcher_starts_in_a_pod_have_its_numbers(ranks):
    assert read_environment({"JOB_COMPLETION_INDEX": "7", **ranks}) == read_environment(ranks)


@pytest.mark.parametrize("size", [{}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "1"}])
def test_a_job_of_one_pod_is_a_single_process(size):
    assert read_environment({"JOB_COMPLETION_INDEX": "0", **size}) == DistributedEnvironment()


def test_pods_that_would_train_alone_are_an_error():
    with pytest.raises(RankError, match="JOB_COMPLETION_INDEX=1, but neither a launcher nor WORLD_SIZE") as caught:
        read_environment({"JOB_COMPLETION_INDEX": "1"})
    fixes = ("python -m distlenet.launch, as launch/kubernetes/job.yaml", "MASTER_ADDR=NAME-0.SERVICE", "unset JOB_")
    assert all(fix in str(caught.value) for fix in fixes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"JOB_COMPLETION_INDEX": "2"}, "JOB_COMPLETION_INDEX=2, but WORLD_SIZE=2; set WORLD_SIZE to the completions"),
        ({"JOB_COMPLETION_INDEX": ""}, "JOB_COMPLETION_INDEX='': expected an integer, 0 to"),
        ({"WORLD_SIZE": "$(PODS)"}, "WORLD_SIZE='$(PODS)': expected an integer, 1 to"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0': expected an integer, 1 to"),
        ({"MASTER_ADDR": ""}, "JOB_COMPLETION_INDEX=1 and WORLD_SIZE=2, but MASTER_ADDR is not set; set MASTER_ADDR="),
        ({"MASTER_PORT": "0"}, "MASTER_PORT='0': expected an integer, 1 to 65535"),
    ],
)
def test_a_pod_reports_what_is_missing(change, message):
    with pytest.raises(RankError, match=re.escape(message)):
        read_environment(POD | change)
