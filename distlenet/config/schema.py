"""Every setting, with its default, its help and its range, in frozen dataclasses."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal


def setting(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    lt: float | None = None,
    result: bool = False,
) -> Any:
    """Declare one setting: its default, its help and the range of its number.

    ``result=True`` marks a setting that changes what is learned. Such settings name the run, and a
    checkpoint made with other values of them is not resumed.
    """
    metadata = {"help": help, "ge": ge, "gt": gt, "lt": lt, "result": result}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RunConfig:
    """Where a run keeps its files, and how it speaks."""

    dir: str = setting("runs", "Folder of all runs; shared by all nodes.")
    name: str | None = setting(
        None, "Folder of this run inside run.dir; null makes one from the settings that change the result."
    )
    console: Literal["auto", "tutorial"] = setting(
        "auto",
        "auto: a progress bar on a terminal, else plain lines; tutorial: the PyTorch tutorial's lines.",
    )
    report: Literal["auto", "always", "never"] = setting(
        "auto", "Write report.html at the end; auto: on a terminal, or where the run took a minute."
    )


@dataclass(frozen=True)
class DataConfig:
    """What is learned from."""

    name: Literal["fashion_mnist", "mnist", "digits", "synthetic"] = setting(
        "fashion_mnist", "Data set; digits is bundled and needs no network.", result=True
    )
    root: str = setting("data", "Folder looked into first, and downloaded to.")
    augment: Literal["none", "shift", "flip_shift"] = setting(
        "none", "Random shift; flip_shift also mirrors half of the images.", result=True
    )
    shift: int = setting(2, "Largest random shift, in pixels each way.", ge=1, lt=32, result=True)
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "Where the images stay; auto: on the GPU, if there is one and they take a quarter of it at most."
    )
    num_workers: int = setting(0, "Loader processes per rank; 0 loads in the rank itself.", ge=0, lt=1000)
    drop_last: bool = setting(
        False, "Drop an epoch's last, shorter global batch instead of training on it.", result=True
    )
    ledger: bool = setting(False, "Record which samples each rank consumed, for python -m distlenet.ledger.")
    synthetic_train: int = setting(60000, "Training images of data.name=synthetic.", ge=1, lt=2**31, result=True)
    synthetic_test: int = setting(10000, "Test images of data.name=synthetic.", ge=1, lt=2**31, result=True)


@dataclass(frozen=True)
class ModelConfig:
    """What learns."""

    name: Literal["lenet"] = setting("lenet", "Network, by its name in distlenet.models.registry.MODELS.", result=True)
    channels_last: bool = setting(True, "Lay images and convolutions' weights out channels last.", result=True)


@dataclass(frozen=True)
class TrainConfig:
    """How long, and in which portions."""

    epochs: int = setting(8, "Passes over the training set.", ge=1, lt=2**31, result=True)
    max_steps: int | None = setting(
        None, "Stop after this many optimizer steps; null: after train.epochs.", ge=1, lt=2**53, result=True
    )
    global_batch_size: int = setting(
        128,
        "Images per optimizer step over all ranks; ranks × accumulation must divide it.",
        ge=1,
        lt=2**31,
        result=True,
    )
    accumulation_steps: int = setting(1, "Micro-batches per optimizer step on each rank.", ge=1, lt=2**20)
    log_every: int = setting(
        50, "Steps between two records of the training loss; lines in a file come every 5 s at most.", ge=1
    )
    check_replicas_every: int | None = setting(
        500, "Steps between two checks that all ranks hold the same parameters; null: at start and end only.", ge=1
    )
    label_smoothing: float = setting(0.05, "Label smoothing of the training loss.", ge=0, lt=1, result=True)
    max_grad_norm: float | None = setting(None, "Largest norm of the gradient; null: no clipping.", gt=0, result=True)
    on_nonfinite: Literal["stop", "skip"] = setting(
        "stop",
        "What follows a step whose loss is not finite, after RUN/diagnosis tells why: the run stops, or goes on "
        "without the step, for which on a GPU the host waits for each step.",
    )
    max_skipped_steps: int = setting(10, "Steps in all that train.on_nonfinite=skip skips, before the run stops.", ge=1)
    cuda_graph: Literal["off", "auto"] = setting(
        "off", "auto: replay a step as a CUDA graph, where that can be, with the learning rate in float32.", result=True
    )


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: Literal["sgd", "adamw"] = setting("sgd", "Optimizer.", result=True)
    lr: float = setting(0.2, "Peak learning rate.", gt=0, result=True)
    momentum: float = setting(0.9, "Momentum of SGD.", ge=0, lt=1, result=True)
    nesterov: bool = setting(True, "Nesterov's momentum, for SGD.", result=True)
    weight_decay: float = setting(5e-4, "Weight decay.", ge=0, result=True)
    schedule: Literal["constant", "cosine", "one_cycle"] = setting(
        "one_cycle", "Learning-rate schedule, stepped once per optimizer step.", result=True
    )
    warmup_steps: int | None = setting(
        None,
        "Steps of rising learning rate; null: none, but 30 % of all steps for one_cycle.",
        ge=0,
        result=True,
    )


@dataclass(frozen=True)
class DistributedConfig:
    """How ranks work together."""

    backend: Literal["auto", "nccl", "gloo"] = setting(
        "auto", "auto: NCCL where every local rank has a GPU of its own, else Gloo."
    )
    reduction: Literal["exact", "ddp"] = setting(
        "ddp", "exact: the same bits on any number of ranks; ddp: DistributedDataParallel's own sums.", result=True
    )
    gradient_compression: Literal["none", "bf16"] = setting(
        "none", "bf16: ddp sends gradients rounded to bf16, half the bytes; for many nodes.", result=True
    )
    shared_memory: Literal["auto", "off"] = setting(
        "auto",
        "auto: ranks that are all on one machine's CPUs add gradients in memory that they share; off: by Gloo, with "
        "other last bits from 3 ranks on.",
    )
    virtual_shards: int = setting(
        8,
        "Micro-batches of a global batch with reduction=exact; the number of ranks must divide it.",
        ge=1,
        lt=2**20,
        result=True,
    )
    allow_uneven_batches: bool = setting(
        False, "Let ranks take unequal shares where their number does not divide the batch."
    )
    init_timeout_s: float = setting(
        300.0, "Seconds until the first step in which all ranks must come, or the job ends.", ge=1, lt=1e6
    )
    step_timeout_s: float = setting(120.0, "Seconds after which a step that does not end ends the job.", ge=1, lt=1e6)
    threads: int | None = setting(
        None, "CPU threads per rank; null: OMP_NUM_THREADS where it is set, else 1.", ge=1, lt=1000
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a run."""

    every_steps: int | None = setting(
        None, "Optimizer steps between checkpoints inside an epoch; null: at epoch ends only.", ge=1
    )
    preemption_grace_s: float = setting(
        25.0,
        "Seconds from the signal to stop until a job is gone, saved or not; torchrun kills after 30.",
        gt=0,
        lt=1e6,
    )
    max_restarts_without_progress: int = setting(
        5, "Automatic restarts in a row from the same checkpoint after which a run gives up.", ge=1
    )
    keep_last: int = setting(3, "Newest checkpoints kept, besides the best.", ge=1)
    resume: str = setting(
        "auto", "auto: go on from the run's newest checkpoint; never: start anew; or a file or run folder."
    )
    allow_changed: list[str] = setting([], "Result-changing keys that may differ from the resumed checkpoint's.")
    path: str | None = setting(None, "File or run folder that evaluate reads; checkpoint=PATH is its short form.")


@dataclass(frozen=True)
class TrackingConfig:
    """Where the numbers go besides the run folder and W&B."""

    tensorboard: bool = setting(False, "Write TensorBoard's event files to RUN/tensorboard.")


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = setting(
        "auto", "auto: what WANDB_MODE says, else online where a key is configured, else offline."
    )
    project: str = setting("distlenet", "Project of the run.")
    entity: str | None = setting(None, "User or team; null: the key's own.")
    group: str | None = setting(None, "Group of runs.")
    tags: list[str] = setting([], "Tags of the run.")
    notes: str | None = setting(None, "Notes on the run.")
    log_checkpoints: bool = setting(False, "Send the best checkpoint as an artifact.")
    finish_timeout_s: float = setting(
        15.0, "Seconds that W&B has at the end of a job; what it misses is sent by report --replay-wandb.", ge=0, lt=1e6
    )


@dataclass(frozen=True)
class Config:
    """Everything a run is made from."""

    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    seed: int = setting(0, "Seed of initial weights, order and augmentation.", ge=0, lt=2**32, result=True)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto", "auto: bf16 where the GPU has it, else fp16; fp32 on CPU.", result=True
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: a GPU per rank where there are GPUs.")
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)
    wandb: WandbConfig = dataclasses.field(default_factory=WandbConfig)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as nested dicts of plain values."""
        return dataclasses.asdict(self)
