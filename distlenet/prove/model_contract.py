"""Check model, loss and metrics by direct calls."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distlenet.config.schema import Config
from distlenet.distributed.context import DistributedContext
from distlenet.prove.checks import (
    Finding,
    ShapeError,
    check_shape,
    compare_values,
    hook,
    outputs_differ,
    spoil_generators,
)
from distlenet.prove.digests import digest, is_per_sample, take
from distlenet.task import Data, Task, new_model
from distlenet.utils.nested import count_samples

ALONE = 8  # samples whose loss is also computed alone
NOISE = 0.02  # added to the weights: a last layer of zeros would give all samples the same loss
USES = 5  # batches computed in training mode: running statistics leave their initial values, 0 and 1
REPEATED = 1e-6  # tolerance of the same computation: on a GPU, not every kernel is deterministic
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
"""Of the loss of a sample, alone and in a batch: kernels for 1 and for 64 samples add in different orders.

A sum of float32 has relative errors of about 1e-7 per term; this is 1,000 times that. On a GPU, a convolution in fp32
may multiply in TF32, which has 10 bits: its tolerance is 1e-3.
"""


class ModelContract:
    """Checks with one batch of transformed samples."""

    def __init__(self, config: Config, task: Task, context: DistributedContext, inputs: Data) -> None:
        self.config, self.task, self.context, self.inputs = config, task, context, inputs
        tf32 = context.device.type == "cuda" and context.precision == "fp32"
        self.n, self.tolerance = count_samples(inputs), 1e-3 if tf32 else TOLERANCE[context.precision]
        self.model = self.new_model()

    def new_model(self) -> nn.Module:
        """Return a network with the initial weights of the run."""
        torch.manual_seed(self.config.seed)
        with hook("model"):
            return new_model(self.task).to(self.context.device)

    def weights(self) -> dict[str, str]:
        """Return the digests of the initial weights and buffers."""
        return {f"initial {name}": digest(value) for name, value in self.model.state_dict().items()}

    def run(self) -> list[Finding]:
        """Run all checks until one shows that the next is meaningless."""
        try:
            with hook("loss"):
                findings = self.check_losses(self.model.eval())
                noisy = self.noisy_model()
                findings = findings or self.check_losses(noisy)
                outputs = self.loss(noisy)[1]
        except ShapeError as error:
            return [Finding("loss: one per sample", "loss shape", str(error))]
        if not findings:
            findings = [Finding(f"loss: {check}", None) for check in ("one per sample", "again", "samples alone")]
            findings.append(self.check_state())
        return [*findings, self.check_metrics(noisy, outputs), *self.check_prediction(outputs)]

    def noisy_model(self) -> nn.Module:
        """Return a network with other weights, and with the buffers that it has after some batches."""
        noisy = copy.deepcopy(self.model)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in noisy.parameters():
                noise = torch.randn(parameter.shape, generator=generator) * NOISE
                parameter.add_(noise.to(parameter.device, parameter.dtype))
        for seed in range(USES):
            self.loss(noisy.train(), seed=seed)
        return noisy.eval()

    def loss(self, model: nn.Module, positions: Sequence[int] | None = None, seed: int = 0) -> tuple[Tensor, Any]:
        """Return losses, with their weights if there are any, float64 (n, 1 or 2), and outputs."""
        inputs = self.inputs if positions is None else take(self.inputs, positions)
        spoil_generators(seed)
        with torch.no_grad(), self.context.autocast():
            losses, outputs = self.task.loss(model, inputs)
        columns = losses if isinstance(losses, tuple) else (losses,)
        for values in columns:
            check_shape("loss", values, count_samples(inputs))
        return torch.stack([values.double() for values in columns], 1), outputs

    def check_losses(self, model: nn.Module) -> list[Finding]:
        """Compute losses again, in reverse order, and sample by sample; return what fails."""
        alone, backwards = range(min(self.n, ALONE)), range(self.n)[::-1]
        (losses, outputs), (again, outputs_again) = self.loss(model, seed=1), self.loss(model, seed=2)
        comparable = is_per_sample(outputs, self.n)
        if problem := compare_values(losses, again, REPEATED):
            by_model = comparable and outputs_differ(outputs, outputs_again, REPEATED)
            return [Finding("loss: again", "model again" if by_model else "loss again", problem)]
        parts = [self.loss(model, [k]) for k in alone]
        others = take(self.loss(model, backwards)[0], backwards)
        others[: len(alone)] = torch.cat([losses_alone for losses_alone, _ in parts])
        problem = compare_values(losses, others, self.tolerance)
        if problem is None:
            return []
        if comparable and any(outputs_differ(take(outputs, [k]), parts[k][1], self.tolerance) for k in alone):
            cause = "model alone"
        else:
            cause = "loss mean" if float(losses[:, 0].max() - losses[:, 0].min()) < REPEATED else "loss alone"
        return [Finding("loss: samples alone", cause, problem)]

    def check_metrics(self, model: nn.Module, outputs: Any) -> Finding:
        """Compute the metrics in reverse order, and sample by sample: from the same outputs, if possible."""
        comparable = is_per_sample(outputs, self.n)

        def metrics(positions: Sequence[int]) -> Tensor:
            part = take(outputs, positions) if comparable else self.loss(model, positions)[1]
            values = self.task.metrics(part, take(self.inputs, positions))
            for name, value in values.items():
                check_shape(name, value, len(positions))
            return torch.stack([torch.zeros(len(positions)), *(value.double().cpu() for value in values.values())], 1)

        try:
            with hook("metrics"):
                whole, backwards = metrics(range(self.n)), metrics(range(self.n)[::-1])
                alone = torch.cat([metrics([k]) for k in range(self.n)])
        except ShapeError as error:
            return Finding("metrics: one per sample", "metrics shape", str(error))
        tolerance = REPEATED if comparable else self.tolerance
        problem = compare_values(whole, alone, tolerance) or compare_values(whole, backwards.flip(0), tolerance)
        return Finding("metrics: samples alone", "metrics alone" if problem else None, problem or "")

    def check_prediction(self, outputs: Any) -> list[Finding]:
        """Compute what ``Task.summary_metrics`` receives, sample by sample, from the same outputs."""
        with hook("metrics"):
            whole = self.task.prediction(outputs, self.inputs)
            if whole is None or not is_per_sample(outputs, self.n):
                return []
            parts = [self.task.prediction(take(outputs, [k]), take(self.inputs, [k])) for k in range(self.n)]
            mixes = not is_per_sample(whole, self.n) or any(
                outputs_differ(take(whole, [k]), part, REPEATED) for k, part in enumerate(parts)
            )
        return [Finding("prediction: samples alone", "metrics alone" if mixes else None, "differs" if mixes else "")]

    def check_state(self) -> Finding:
        """Load the state of a network that has computed two batches into a new one: both must compute the same."""
        used, new = self.new_model(), self.new_model()
        with hook("model"):
            for seed in (1, 2):
                self.loss(used.train(), seed=seed)
            new.load_state_dict(used.state_dict())
            problems = [
                compare_values(self.loss(used.train(mode))[0], self.loss(new.train(mode))[0], REPEATED)
                for mode in (False, True)
            ]
        problem = problems[0] or problems[1]
        return Finding("model: its state_dict holds all state", "model state" if problem else None, problem or "")

    def mixes_in_training(self) -> bool:
        """Return whether, in training mode, the losses of half a batch differ from those in the batch."""
        half = range(self.n // 2, self.n)  # the second: the first may draw the same numbers for dropout as the whole
        try:
            whole, part = (self.loss(self.new_model().train(), positions)[0] for positions in (None, half))
        except (RuntimeError, ValueError, ShapeError):  # a BatchNorm refuses a single value
            return True
        return compare_values(whole[-len(half) :], part, self.tolerance) is not None
