import sys

import pytest

from distlenet import train
from distlenet.config.arguments import parse_arguments
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit


def test_two_hyphens_before_a_setting_are_accepted():
    """The sweep agents of W&B write settings so."""
    words = ["--train.epochs=3", "seed=1", "--config=a.yaml", "--seed=2", "--config", "b.yaml", "--optim.lr=-1"]
    assert parse_arguments("x", "y", words) == (
        ["a.yaml", "b.yaml"],
        ["train.epochs=3", "seed=1", "seed=2", "optim.lr=-1"],
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--foo=1"], "foo=1: unknown key 'foo'"),
        (["--train.epoch=1"], "train.epoch=1: unknown key 'train.epoch'; did you mean train.epochs?"),
        (["--foo"], "unrecognized arguments: --foo; --help lists all"),
        (["--train.epochs", "3"], "unrecognized arguments: --train.epochs; did you mean train.epochs=VALUE?"),
        (["--epochs", "3"], "unrecognized arguments: --epochs; did you mean train.epochs=VALUE?"),
        (["--batch-size", "64"], "--batch-size; did you mean train.global_batch_size=VALUE?"),
        (["--confg", "ci"], "unrecognized arguments: --confg; did you mean --config?"),
        (["--dryrun"], "did you mean --dry-run?"),
        (["train.epochs", "3"], "train.epochs: expected key=value; write train.epochs=VALUE"),
        (["--dry=1"], "unknown key 'dry'"),  # not an abbreviation of --dry-run
        (["--dry-run=1"], "--dry-run: ignored explicit argument '1'"),
        (["--world-size=0", "--dry-run"], "--world-size: 0: expected an integer"),
        (["--dry-run", "--train.epochs=0"], "train.epochs=0: expected an integer, at least 1"),
    ],
)
def test_train_reports_a_wrong_word_with_two_hyphens(monkeypatch, words, message):
    monkeypatch.setattr(sys, "argv", ["train", *words])
    with pytest.raises(UserError) as error:
        train.main()
    assert message in str(error.value)


def test_train_accepts_settings_with_two_hyphens(monkeypatch, capsys):
    words = ["--dry-run", "--data.name=digits", "--device=cpu", "--train.epochs=3", "--world-size=2"]
    monkeypatch.setattr(sys, "argv", ["train", *words])
    train.main()
    assert "3 epochs" in capsys.readouterr().out
