import json
import threading

import pytest
import torch.distributed as dist

from distlenet.distributed.environment import DistributedEnvironment
from distlenet.distributed.rendezvous import host_key
from distlenet.distributed.watchdog import Watchdog

pytestmark = pytest.mark.unit


def watchdogs(ranks: int, limit_s: float = 1.0) -> list[Watchdog]:
    """Watchdogs of several ranks over one store; none of them ends this process."""
    store = dist.HashStore()
    for rank in range(ranks):
        store.set(host_key(rank), f"word host{rank // 2}")
    made = [Watchdog(store, DistributedEnvironment(rank, 0, ranks), limit_s, None) for rank in range(ranks)]
    for watchdog in made:
        watchdog.set_timeout(limit_s, "distributed.step_timeout_s")
    return made


def ask(asking: list[Watchdog]) -> list[str | None]:
    """Have several ranks ask at the same time; return what each found."""
    found: dict[int, str | None] = {}
    threads = [threading.Thread(target=lambda w=w: found.update({w.env.rank: w.collect_notes(0.5)})) for w in asking]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[w.env.rank] for w in asking]


def test_those_who_do_not_answer_are_named_once_with_their_hosts():
    made = watchdogs(5)
    assert ask([made[1], made[4]]) == ["no answer from rank 0 on host0, ranks 2, 3 on host1", None]


def test_a_rank_that_answers_but_is_behind_is_named():
    made = watchdogs(2)
    for watchdog, step in zip(made, (40, 39), strict=True):
        watchdog.heartbeat(step)
    (told, silent) = ask(made)
    assert told.startswith("all ranks answer, but rank 1 on ")
    assert told.endswith("ended only step 39")
    assert silent is None


def test_all_at_the_same_step():
    assert "look at the network" in ask(watchdogs(2))[0]


def test_it_ends_the_process_when_no_step_ends_and_not_before(capsys):
    watchdog = watchdogs(2, limit_s=0.3)[1]
    ended = threading.Event()
    statuses = []
    watchdog.end = lambda status: (statuses.append(status), ended.set())
    thread = threading.Thread(target=watchdog.watch)
    thread.start()
    for step in range(30):  # 0.6 s of beats: twice the limit
        watchdog.heartbeat(step)
        assert not ended.wait(0.02)
    assert ended.wait(30)
    thread.join()
    assert statuses == [1]
    told = capsys.readouterr().err
    assert "no step ended for 0.3 s (distributed.step_timeout_s) after step 29; no answer from rank 0 on host0" in told
    assert json.loads(watchdog.store.get("late/1"))[0] == 29
