"""Random numbers by keys: their distributions, their independence, and that only the key determines them."""

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from distlenet.task import SampleKeys
from distlenet.utils.normal_quantile import normal_quantile

pytestmark = pytest.mark.unit

SAMPLES, ELEMENTS = 2**13, (4, 4)
N = SAMPLES * 16
KEYS = SampleKeys(seed=7, epoch=3, indices=torch.arange(SAMPLES))

DRAWS = {
    "uniform": lambda keys, shape: keys.uniform("a", shape),
    "normal": lambda keys, shape: keys.normal("a", shape),
    "integers": lambda keys, shape: keys.integers("a", 2**31, shape),
    "choice": lambda keys, shape: keys.choice("a", [1, 2, 5], shape, [0.5, 0.25, 0.25]),
    "bernoulli": lambda keys, shape: keys.bernoulli("a", 0.5, shape),
}
each_draw = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)


def kolmogorov(probabilities: Tensor) -> float:
    """Return the Kolmogorov-Smirnov distance of values of a distribution function from the uniform distribution."""
    n, ordered = probabilities.numel(), probabilities.flatten().sort().values
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return max(float((steps[1:] - ordered).max()), float((ordered - steps[:-1]).max()))


def chi_square(values: Tensor, probabilities: dict[float, float]) -> float:
    """Return by how many standard deviations the chi-square statistic exceeds its mean."""
    counts = {value: int((values == value).sum()) for value in probabilities}
    assert sum(counts.values()) == values.numel()
    n, freedom = values.numel(), len(counts) - 1
    statistic = sum((counts[value] - n * p) ** 2 / (n * p) for value, p in probabilities.items())
    return (statistic - freedom) / math.sqrt(2 * freedom)


# A Kolmogorov-Smirnov distance of n draws exceeds 1.95 / sqrt(n) with probability 0.001. The seed is fixed.
KOLMOGOROV_LIMIT = 1.95 / math.sqrt(N)
CORRELATION_LIMIT = 5 / math.sqrt(N)  # five standard deviations of the correlation of independent numbers


def test_uniform_numbers_are_uniform():
    values = KEYS.uniform("a", ELEMENTS, low=-2.0, high=6.0)
    assert (values.dtype, values.shape) == (torch.float32, (SAMPLES, *ELEMENTS))
    assert -2 <= float(values.min()) < float(values.max()) < 6
    assert kolmogorov((values.double() + 2) / 8) < KOLMOGOROV_LIMIT
    # Standard deviations of the mean and of the variance of n uniform numbers, 8 wide; five of them.
    assert float(values.double().mean()) == pytest.approx(2, abs=5 * 8 / math.sqrt(12 * N))
    assert float(values.double().var()) == pytest.approx(64 / 12, abs=5 * 64 / math.sqrt(180 * N))


def test_normal_numbers_are_normal():
    values = KEYS.normal("a", ELEMENTS)
    assert (values.dtype, values.shape) == (torch.float32, (SAMPLES, *ELEMENTS))
    assert kolmogorov(torch.special.ndtr(values.double())) < KOLMOGOROV_LIMIT
    moments = [float((values.double() ** k).mean()) for k in (1, 2, 3, 4)]
    # The variance of x^k is E x^2k - (E x^k)^2: 1, 2, 15 and 96.
    for moment, expected, variance in zip(moments, (0, 1, 0, 3), (1, 2, 15, 96), strict=True):
        assert moment == pytest.approx(expected, abs=5 * math.sqrt(variance / N))
    assert torch.equal(KEYS.normal("a", ELEMENTS, mean=3.0, std=0.5), values * 0.5 + 3)


def test_normal_quantile_is_exact_to_float32_in_all_its_range():
    generator = torch.Generator().manual_seed(0)
    tails = [torch.arange(100_000), torch.arange(2**31 - 100_000, 2**31)]
    bits = torch.cat([*tails, *(torch.randint(0, 2**k, (20_000,), generator=generator) for k in range(1, 32))])
    expected = -torch.special.ndtri((bits.double() + 0.5) / 2**32)
    error = (normal_quantile(bits).double() - expected).abs()
    assert float((error - expected.abs() * 2.0**-24).max()) < 1e-8  # after half a unit in float32's last place
    assert torch.equal(normal_quantile(bits + 2**31), -normal_quantile(bits))
    assert float(normal_quantile(torch.zeros(1, dtype=torch.int64))) == pytest.approx(6.338, abs=1e-3)


@pytest.mark.parametrize(("low", "high"), [(0, 2), (-3, 4), (10, 110)])
def test_integers_are_equally_likely(low, high):
    values = KEYS.integers("a", high, ELEMENTS, low=low)
    assert values.dtype == torch.int64
    assert chi_square(values, {float(value): 1 / (high - low) for value in range(low, high)}) < 4


def test_integers_of_a_large_range_reach_all_its_parts():
    values = KEYS.integers("a", 2**31, ELEMENTS)
    assert kolmogorov((values.double() + 0.5) / 2**31) < KOLMOGOROV_LIMIT
    assert len(values.unique()) > N - 30  # n² / 2^32 = 4 repeats are expected
    assert torch.equal(KEYS.integers("a", 1), torch.zeros(SAMPLES, dtype=torch.int64))


def test_choice_has_its_probabilities():
    values = KEYS.choice("a", [1, 5, 9], ELEMENTS, [0.1, 0.0, 0.9])
    assert values.dtype == torch.int64
    assert set(values.unique().tolist()) == {1, 9}
    assert chi_square(values, {1: 0.1, 9: 0.9}) < 4
    assert KEYS.choice("a", [0.5, 1, 2]).dtype == torch.float32
    assert chi_square(KEYS.choice("a", [0.5, 1, 2], ELEMENTS), dict.fromkeys([0.5, 1, 2], 1 / 3)) < 4


def test_bernoulli_has_its_probability():
    for p in (0.0, 0.02, 0.5, 1.0):
        share = float(KEYS.bernoulli("a", p, ELEMENTS).double().mean())
        assert share == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / N))


@each_draw
def test_numbers_depend_only_on_the_key(draw):
    """Not on the other samples of the batch, nor on their order; the epoch may be a tensor, for a CUDA graph."""
    whole = draw(KEYS, (5,))
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(3))
    parts = [draw(SampleKeys(7, torch.tensor(3), KEYS.indices[part]), (5,)) for part in order.split(1001)]
    assert torch.equal(torch.cat(parts), whole[order])
    assert draw(SampleKeys(7, 3, torch.zeros(0, dtype=torch.int64)), (5,)).shape == (0, 5)


@each_draw
def test_elements_do_not_depend_on_the_shape(draw):
    assert torch.equal(draw(KEYS, (2, 3)).flatten(1), draw(KEYS, (6,)))
    assert torch.equal(draw(KEYS, (6,))[:, 0], draw(KEYS, ()))
    assert torch.equal(draw(KEYS, (37,))[:, :5], draw(KEYS, (5,)))  # for ragged samples: any length of the longest


def others(keys: SampleKeys) -> list[SampleKeys]:
    indices = keys.indices
    return [SampleKeys(8, 3, indices), SampleKeys(7, 4, indices), keys.split("b"), SampleKeys(7, 3, indices + SAMPLES)]


@each_draw
def test_seeds_epochs_samples_elements_and_splits_are_independent(draw):
    def standardised(values: Tensor) -> Tensor:
        values = values.double().flatten()
        return (values - values.mean()) / values.std()

    first = draw(KEYS, ELEMENTS)
    for keys in others(KEYS):
        assert abs(float((standardised(first) * standardised(draw(keys, ELEMENTS))).mean())) < CORRELATION_LIMIT
    for neighbor in (first.roll(1, 0), first.roll(1, 1), first.roll(1, 2)):
        assert abs(float((standardised(first) * standardised(neighbor)).mean())) < CORRELATION_LIMIT


def test_names_and_methods_are_independent():
    """Two calls give the same numbers only if they have the same name, which is therefore required."""
    draws = [KEYS.uniform(name, ELEMENTS).double() - 0.5 for name in ("a", "b", "", "'a'")]
    draws += [(KEYS.integers("a", 2**31, ELEMENTS) / 2**31).double() - 0.5, KEYS.normal("a", ELEMENTS).double()]
    for k, first in enumerate(draws):
        for second in draws[:k]:
            correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
            assert abs(float(correlation)) < CORRELATION_LIMIT
    with pytest.raises(TypeError, match="name for the purpose"):
        KEYS.normal((3, 4))


def test_samples_do_not_share_their_numbers():
    """Of n draws of 32 bits, n²/2^33 are expected to be repeats; no two samples have more than one in common."""
    words = SampleKeys(7, 3, torch.arange(2**16))._words("uniform", "a", ELEMENTS)
    assert 0 <= int(words.min()) < int(words.max()) < 2**32
    ordered, positions = words.flatten().sort()
    repeats = (ordered[1:] == ordered[:-1]).nonzero().squeeze(1)
    assert len(repeats) < 128 + 5 * math.sqrt(128)  # n = 2^20
    samples = torch.stack([positions[repeats], positions[repeats + 1]], 1) // 16
    assert len(samples.sort(1).values.unique(dim=0)) == len(repeats)


def test_numbers_are_the_same_in_every_version():
    """A checkpoint is resumed with the random numbers that the run began with."""
    keys = SampleKeys(1, 2, torch.tensor([0, 59_999]))
    assert keys.uniform("noise", (2,)).tolist() == [
        [0.4534996747970581, 0.2882125973701477],
        [0.16662710905075073, 0.031354546546936035],
    ]
    assert keys.normal("noise", (2,)).tolist() == [
        [-0.9535362720489502, 1.2302706241607666],
        [-1.1088396310806274, -0.9763264656066895],
    ]
    assert keys.integers("noise", 1000, (2,)).tolist() == [[817, 940], [645, 915]]


@pytest.mark.parametrize(
    "call",
    [
        lambda: KEYS.integers("a", 0),
        lambda: KEYS.integers("a", 2**31, low=-1),
        lambda: KEYS.choice("a", []),
        lambda: KEYS.choice("a", [1, 2], probabilities=[1.0]),
        lambda: KEYS.choice("a", [1, 2], probabilities=[0.5, 0.4]),
        lambda: KEYS.choice("a", [1, 2], probabilities=[1.5, -0.5]),
        lambda: KEYS.bernoulli("a", 1.5),
    ],
)
def test_impossible_arguments_are_refused(call):
    with pytest.raises(ValueError, match="expected"):
        call()


@each_draw
def test_no_draw_reads_a_value_on_the_host(draw):
    """Which would be a host sync on a GPU. Fake tensors have no values to read."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert draw(SampleKeys(7, torch.tensor(3), torch.arange(5)), ELEMENTS).shape == (5, *ELEMENTS)
