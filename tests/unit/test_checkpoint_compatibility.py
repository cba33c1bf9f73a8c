import pytest
from checkpoint_states import lenet_state

from distlenet.checkpoint.compatibility import check_same_settings, choose_resumable
from distlenet.checkpoint.store import CheckpointStore
from distlenet.config.loading import load_config, settings_to_save
from distlenet.models.lenet import Net
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit


def store_in(run_dir) -> CheckpointStore:
    return CheckpointStore(run_dir / "checkpoints", keep_last=3)


def test_resume_selects_the_newest_a_given_checkpoint_or_none(tmp_path):
    own = store_in(tmp_path / "own")
    other = store_in(tmp_path / "other").write(lenet_state(5))
    auto, never = load_config(), load_config([], ["checkpoint.resume=never"])
    given = load_config([], [f"checkpoint.resume={tmp_path / 'other'}"])
    assert choose_resumable(auto, own, Net()) is None
    assert choose_resumable(never, own, Net()) is None
    assert choose_resumable(given, own, Net())[0] == other
    newest = own.write(lenet_state(9))
    assert choose_resumable(auto, own, Net())[0] == newest
    for config in (given, never):
        with pytest.raises(UserError, match=r"already holds step-00000009\.pt"):
            choose_resumable(config, own, Net())


def test_a_run_started_from_a_checkpoint_resumes_with_the_same_command(tmp_path):
    other = store_in(tmp_path / "other").write(lenet_state(5))
    own = store_in(tmp_path / "own")
    newest = own.write({**lenet_state(9), "started_from": str(other)})
    same_command = load_config([], [f"checkpoint.resume={other}"])
    assert choose_resumable(same_command, own, Net())[0] == newest
    another_command = load_config([], [f"checkpoint.resume={tmp_path / 'other'}"])
    with pytest.raises(UserError, match="already holds"):
        choose_resumable(another_command, own, Net())


def test_settings_that_affect_the_result_are_refused_and_others_accepted(tmp_path):
    saved = lenet_state(1)
    harmless = ["run.name=x", "data.num_workers=3", "train.log_every=1", "device=cpu", "train.accumulation_steps=2"]
    check_same_settings(saved, load_config([], harmless), tmp_path)
    changed = ["seed=1", "optim.lr=0.5"]
    with pytest.raises(UserError) as error:
        check_same_settings(saved, load_config([], changed), tmp_path)
    assert "seed (was 0, now 1), optim.lr (was 0.2, now 0.5)" in str(error.value)
    assert "checkpoint.allow_changed=[seed,optim.lr]" in str(error.value)
    check_same_settings(saved, load_config([], [*changed, "checkpoint.allow_changed=[seed,optim.lr]"]), tmp_path)


def test_virtual_shards_are_compared_by_number_if_they_are_used(tmp_path):
    def check(saved, now):
        state = {**lenet_state(1), "config": saved}
        check_same_settings(state, load_config([], now), tmp_path)

    exact, ddp = "distributed.reduction=exact", "distributed.reduction=ddp"
    saved = settings_to_save(load_config([], [exact]))
    assert saved["distributed"]["virtual_shards"] == 2
    check(saved, [exact])
    check(saved, [exact, "distributed.virtual_shards=2"])
    with pytest.raises(UserError, match=r"distributed\.virtual_shards \(was 2, now 8\)"):
        check(saved, [exact, "distributed.virtual_shards=8"])
    former = load_config([], ["distributed.virtual_shards=8"]).to_dict()  # the default of former versions
    check(former, [ddp])
    check(former, [exact, "checkpoint.allow_changed=[distributed.reduction]"])
    former["distributed"]["reduction"] = "exact"
    check(former, [exact, "distributed.virtual_shards=8"])
    with pytest.raises(UserError, match=r"distributed\.virtual_shards \(was 8, now 2\)"):
        check(former, [exact])


def test_settings_of_the_sample_order_cannot_change_inside_an_epoch(tmp_path):
    config = load_config([], ["train.global_batch_size=64", "checkpoint.allow_changed=[train.global_batch_size]"])
    check_same_settings({**lenet_state(8), "batch": 0}, config, tmp_path)
    with pytest.raises(UserError, match=r"8 batches into an epoch, and train\.global_batch_size"):
        check_same_settings({**lenet_state(8), "batch": 8}, config, tmp_path)
