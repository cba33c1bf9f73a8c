"""How far the outputs of an exported network may differ from those of the network: by rounding only.

The network computes in float32. Its rounding error on the given samples is measured: the difference E from the same
operations in float64. A program that runs the exported file computes the same operations, but adds the products in
another order and fuses operations. Its error has the same distribution except for:

- the order of sums: the error of a sum of k products grows with the square root of k. With 16 partial sums, as in
  vectorised kernels, it is sqrt(16) = 4 times smaller than with one.
- the largest of more values: E is the largest error of about 256 samples. Of normally distributed errors, the largest
  of 10**9 (6.2 standard deviations) is at most 1.7 times the largest of 2,560 (3.6).
- the difference of two independent errors: sqrt(2).

The product is 9.6; ``SAFETY`` is the next power of two. ``ROUNDINGS`` are those of the last operations, relative to the
largest value: E may be 0 for a network that only selects or adds small integers. For predictions they are relative to
1 at least: programs approximate the sigmoid with an error relative to 1, also if all probabilities are near 0.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from distlenet.utils.errors import UserError, describe_error

SAFETY = 16.0
ROUNDINGS = 4.0
UNIT = 2.0**-24  # the largest relative error of a float32 rounding


class InFloat64(TorchFunctionMode):
    """Compute each operation in float64 that is written for float32."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Convert arguments, the dtypes that they name, and results."""
        if function is Tensor.float:
            return args[0].double()
        return _in_float64(function(*_in_float64(args), **_in_float64(kwargs or {})))


def _in_float64(values: Any) -> Any:
    return tree_map(_to_float64, values, is_leaf=lambda value: isinstance(value, torch.Size))


def _to_float64(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype == torch.float32:
        return value.double()
    return torch.float64 if value is torch.float32 else value


class RoundingError:
    """The largest rounding error and the largest value of each output, over samples."""

    def __init__(self, network: Callable[..., Mapping[str, Tensor]]) -> None:
        self.network = network
        self.errors: dict[str, float] = {}
        self.values: dict[str, float] = {}

    def measure(self, inputs: Mapping[str, Tensor]) -> None:
        """Compute outputs in float32 and in float64. Raise UserError if that is not possible."""
        outputs = self.network(**inputs)
        try:
            with InFloat64():
                exact = self.network(**inputs)
        except (RuntimeError, TypeError) as error:
            reason = describe_error(error)
            raise UserError(
                f"export: the network cannot be computed in float64, to measure its rounding error: {reason}; in "
                "predict and forward, convert types by x.float() or x.to(torch.float32)"
            ) from error
        for name, value in outputs.items():
            largest = float((value.double() - exact[name].double()).abs().max())
            self.errors[name] = max(self.errors.get(name, 0.0), largest)

    def observe(self, outputs: Mapping[str, Tensor]) -> None:
        """Note the size of the outputs for other samples."""
        for name, value in outputs.items():
            self.values[name] = max(self.values.get(name, 0.0), float(value.abs().max()))

    def tolerances(self) -> dict[str, float]:
        """Return the largest difference that rounding explains, for each output."""
        largest = {name: max(value, 1.0) if name == "predictions" else value for name, value in self.values.items()}
        return {name: SAFETY * error + ROUNDINGS * UNIT * largest[name] for name, error in self.errors.items()}
