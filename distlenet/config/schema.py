"""Every setting, with its default, its help and its range, in frozen dataclasses."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal


def setting(default: Any, help: str, *, result: bool = False, names: tuple[str, ...] = (), **bounds: float) -> Any:
    """Declare one setting: its default, its help and the bounds ``ge``, ``gt``, ``le`` and ``lt`` of its number.

    ``result=True`` marks a setting that changes the result. These settings name the run, and a checkpoint made
    with other values of them is not resumed. ``names`` are the built-in parts that the setting can name; it also
    accepts ``module:attribute``.
    """
    value: Any = {"default_factory": default.copy} if isinstance(default, list | dict) else {"default": default}
    return dataclasses.field(**value, metadata={"help": help, "result": result, "names": names, "bounds": bounds})


@dataclass(frozen=True)
class RunConfig:
    """The files and the output of a run."""

    dir: str = setting(
        "runs", "Parent directory of all runs, which all nodes share; or in an object store, as s3://bucket/prefix."
    )
    local_dir: str | None = setting(
        None, "With run.dir in an object store: parent of each node's local copies; null: in the temporary directory."
    )
    name: str | None = setting(None, "Name of the run; null: derived from the settings that change the result.")
    console: Literal["auto", "tutorial"] = setting(
        "auto", "auto: a progress bar on a terminal, else plain lines; tutorial: the lines of the PyTorch tutorial."
    )
    report: Literal["auto", "always", "never"] = setting(
        "auto", "Write report.html at the end; auto: on a terminal, or if the run takes at least a minute."
    )


@dataclass(frozen=True)
class TaskConfig:
    """Model, data, loss and metrics in one."""

    name: str = setting(
        "image_classification", "Task: distlenet.Task or a class like it.", result=True, names=("image_classification",)
    )
    args: dict[str, Any] = setting({}, "Arguments of task.name, besides the settings.", result=True)


@dataclass(frozen=True)
class DataConfig:
    """The data set and how it is read."""

    name: str = setting(
        "fashion_mnist",
        "Data set; digits is bundled and needs no network; folder, array, tar: your images; or a function that "
        "returns distlenet.Datasets.",
        result=True,
        names=("fashion_mnist", "mnist", "digits", "synthetic", "folder", "array", "tar", "cifar10"),
    )
    args: dict[str, Any] = setting({}, "Arguments of a data.name=MODULE:FUNCTION.", result=True)
    root: str = setting(
        "data", "Directory of the data files, and target of the download; not for a data.name=MODULE:FUNCTION."
    )
    size: int | list[int] | None = setting(
        None, "Resize all images to this height and width, in pixels; null: as stored.", ge=1, lt=2**14, result=True
    )
    validation: float = setting(
        0.0,
        "Share of the training set that is split off for validation, by a hash of the index.",
        ge=0,
        lt=1,
        result=True,
    )
    augment: Literal["none", "shift", "flip_shift"] = setting(
        "none", "shift: random shifts; flip_shift: also mirrors half of the images.", result=True
    )
    shift: int = setting(2, "Largest random shift in pixels, in each direction.", ge=1, lt=32, result=True)
    crop: int | list[int] | None = setting(
        None,
        "Cut a random part out of each image and resize it to this height and width; in evaluation, the center.",
        ge=1,
        lt=2**14,
        result=True,
    )
    crop_scale: list[float] = setting(
        [0.08, 1.0], "Area of the part of data.crop as a share of the image; uniform.", gt=0, le=1, result=True
    )
    crop_ratio: list[float] = setting(
        [3 / 4, 4 / 3], "Width / height of the part of data.crop; log-uniform.", ge=0.01, le=100, result=True
    )
    crop_center: float = setting(
        1.0, "In evaluation, the share of height and width that data.crop keeps.", gt=0, le=1, result=True
    )
    flip: float = setting(0.0, "Probability to mirror an image, left to right.", ge=0, le=1, result=True)
    brightness: float = setting(
        0.0, "Largest random change of the brightness: a factor from [max(0, 1 - b), 1 + b].", ge=0, lt=100, result=True
    )
    contrast: float = setting(
        0.0, "Largest random change of the contrast: a factor from [max(0, 1 - c), 1 + c].", ge=0, lt=100, result=True
    )
    saturation: float = setting(
        0.0,
        "Largest random change of the saturation of color images: a factor from [max(0, 1 - s), 1 + s].",
        ge=0,
        lt=100,
        result=True,
    )
    hue: float = setting(
        0.0,
        "Largest random rotation of the hue of color images, in turns, in both directions.",
        ge=0,
        le=0.5,
        result=True,
    )
    erase: float = setting(
        0.0, "Probability to erase a random rectangle: to the mean color of the training set.", ge=0, le=1, result=True
    )
    erase_scale: list[float] = setting(
        [0.02, 0.33], "Area of the rectangle of data.erase as a share of the image; uniform.", gt=0, le=1, result=True
    )
    erase_ratio: list[float] = setting(
        [0.3, 3.3], "Height / width of the rectangle of data.erase; log-uniform.", ge=0.01, le=100, result=True
    )
    mixup: float = setting(
        0.0, "Alpha of Mixup's shares, which have a Beta(alpha, alpha) distribution; 0: off.", ge=0, lt=100, result=True
    )
    cutmix: float = setting(
        0.0, "Alpha of CutMix; with both, each is applied to half of the images.", ge=0, lt=100, result=True
    )
    cache: str | Literal["off"] = setting(
        "auto",
        "Directory in which decoded image files are kept for all jobs; auto: distlenet in the user's cache directory, "
        "for sets that take long to decode; off: none.",
    )
    build_cache: bool = setting(
        True, "Decode images into data.cache; false: only read what is complete there, as evaluation and preflight do."
    )
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "Device of the images; auto: the GPU, if there is one and they take at most a quarter of its memory."
    )
    num_workers: int = setting(0, "Loader processes per rank; 0: the rank loads the data itself.", ge=0, lt=1000)
    drop_last: bool = setting(False, "Drop the last, shorter global batch of an epoch.", result=True)
    ledger: bool = setting(False, "Record which samples each rank consumes, for python -m distlenet.ledger.")
    synthetic_train: int = setting(60000, "Training images of data.name=synthetic.", ge=1, lt=2**31, result=True)
    synthetic_test: int = setting(10000, "Test images of data.name=synthetic.", ge=1, lt=2**31, result=True)


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    name: str = setting("lenet", "Network, or what returns one.", result=True, names=("lenet",))
    args: dict[str, Any] = setting({}, "Arguments of model.name.", result=True)
    compile: bool = setting(False, "Compile the network of the training steps with torch.compile.", result=True)
    sync_batchnorm: bool = setting(
        False, "Statistics of BatchNorm over the global batch; false: over each micro-batch.", result=True
    )
    channels_last: bool = setting(True, "Store images and convolution weights in channels-last format.", result=True)


@dataclass(frozen=True)
class TrainConfig:
    """The length of the training and its steps."""

    epochs: int = setting(8, "Passes over the training set.", ge=1, lt=2**31, result=True)
    max_steps: int | None = setting(None, "Stop after this many steps; null: no limit.", ge=1, lt=2**53, result=True)
    global_batch_size: int = setting(128, "Images per optimizer step, over all ranks.", ge=1, lt=2**31, result=True)
    accumulation_steps: int = setting(
        1, "Micro-batches per optimizer step on each rank; ranks × this must divide the global batch.", ge=1, lt=2**20
    )
    log_every: int = setting(50, "Steps between records of the loss; plain lines are at least 5 s apart.", ge=1)
    check_replicas_every: int | None = setting(
        500, "Steps between checks that all ranks hold the same parameters; null: only at start and end.", ge=1
    )
    label_smoothing: float = setting(
        0.05,
        "Label smoothing of the training loss of image_classification; another loss ignores it.",
        ge=0,
        lt=1,
        result=True,
    )
    max_grad_norm: float | None = setting(None, "Largest norm of the gradient; null: no clipping.", gt=0, result=True)
    ema_decay: float | None = setting(
        None,
        "Decay per step of a moving average of the weights, which is evaluated in place of the weights; null: none.",
        gt=0,
        lt=1,
        result=True,
    )
    on_nonfinite: Literal["stop", "skip"] = setting(
        "stop",
        "After a step with a non-finite loss, which RUN/diagnosis explains: stop the run, or skip the step "
        "(on a GPU, the host then waits for each step).",
    )
    max_skipped_steps: int = setting(10, "Total of steps that train.on_nonfinite=skip skips before it stops.", ge=1)
    stop_when: str | None = setting(
        None, "End the run when this metric of the validation set, such as val/loss, stops improving.", result=True
    )
    stop_patience: int = setting(
        3, "With train.stop_when: epochs in a row without an improvement after which the run ends.", ge=1, result=True
    )
    cuda_graph: Literal["off", "auto"] = setting("auto", "auto: on a GPU, replay steps as CUDA graphs if possible.")
    profile_steps: str | None = setting(
        None,
        "A:B: trace the steps A to B - 1 of each job, counted from 0, on rank 0, and its GPU's memory, to RUN/profile; "
        "null: none.",
    )
    profile_all_ranks: bool = setting(False, "With train.profile_steps: trace all ranks, each to a file.")


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and the learning-rate schedule."""

    name: str = setting("sgd", "Optimizer, such as torch.optim:NAdam.", result=True, names=("sgd", "adamw"))
    args: dict[str, Any] = setting({}, "Arguments of an optim.name=MODULE:CLASS, besides lr.", result=True)
    lr: float = setting(0.2, "Peak learning rate.", gt=0, result=True)
    momentum: float = setting(0.9, "Momentum of SGD.", ge=0, lt=1, result=True)
    nesterov: bool = setting(True, "Nesterov momentum, for SGD.", result=True)
    weight_decay: float = setting(5e-4, "Weight decay.", ge=0, result=True)
    no_decay: bool = setting(False, "No weight decay of parameters with one dimension: biases, norms.", result=True)
    schedule: str = setting(
        "one_cycle",
        "Learning-rate schedule, such as torch.optim.lr_scheduler:StepLR.",
        result=True,
        names=("constant", "cosine", "one_cycle"),
    )
    schedule_args: dict[str, Any] = setting({}, "Arguments of an optim.schedule=MODULE:CLASS.", result=True)
    warmup_steps: int | None = setting(
        None, "Steps of rising learning rate; null: 30 % of all steps for one_cycle, else 0.", ge=0, result=True
    )


@dataclass(frozen=True)
class DistributedConfig:
    """The cooperation of the ranks."""

    backend: Literal["auto", "nccl", "gloo"] = setting("auto", "auto: NCCL if each rank has its own GPU, else Gloo.")
    reduction: Literal["exact", "ddp"] = setting(
        "ddp",
        "exact: the same bits on any number of ranks; ddp: floats added, as by DistributedDataParallel.",
        result=True,
    )
    gradient_compression: Literal["none", "bf16"] = setting(
        "none", "bf16: ddp sends gradients rounded to bf16, half the bytes; for many nodes.", result=True
    )
    shared_memory: Literal["auto", "off"] = setting(
        "auto",
        "auto: ranks that all run on the CPUs of one machine add gradients in shared memory; off: Gloo adds them; "
        "from 3 ranks on, the last bits differ.",
    )
    virtual_shards: int | Literal["auto"] = setting(
        "auto",
        "With exact: micro-batches of a global batch; the number of ranks divides it. auto: the largest power of two "
        "up to 8 that divides the global batch and leaves at least 256 samples for each, or 2 with at least 32.",
        ge=1,
        lt=2**20,
        result=True,
    )
    allow_uneven_batches: bool = setting(False, "Allow a global batch that the number of ranks does not divide.")
    find_unused_parameters: bool = setting(
        False,
        "With ddp: allow a loss that does not depend on all parameters; their gradient is 0. Each step takes longer.",
    )
    init_timeout_s: float = setting(300.0, "Seconds in which all ranks must reach the first step.", ge=1, lt=10**6)
    step_timeout_s: float = setting(120.0, "Seconds in which a step must end; else the job ends.", ge=1, lt=10**6)
    heartbeat_file: str | None = setting(
        None,
        "File on each node that a training touches at its start and after steps, at most once a second, and removes at "
        "its end, for a liveness probe; null: none.",
    )
    threads: int | None = setting(None, "CPU threads per rank; null: OMP_NUM_THREADS if set, else 1.", ge=1, lt=1000)


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and resuming."""

    every_steps: int | None = setting(None, "Steps between checkpoints; null: only at the end of each epoch.", ge=1)
    preemption_grace_s: float = setting(
        25.0, "Seconds from the stop signal to the exit, saved or not; torchrun kills a job after 30.", gt=0, lt=10**6
    )
    max_restarts_without_progress: int = setting(5, "Restarts from the same checkpoint before the run gives up.", ge=1)
    keep_last: int = setting(3, "Newest checkpoints to keep, in addition to the best.", ge=1)
    best_by: str | None = setting(
        None,
        "Metric of the validation set that selects best.pt; null: val/loss. Names that end in loss or error are "
        "minimised, all others maximised.",
        result=True,
    )
    resume: str = setting("auto", "auto: the run's newest checkpoint; never: start anew; or a file or run directory.")
    init_from: str | None = setting(
        None, "Weights that a new run starts from: a checkpoint, a run directory, or a saved state_dict.", result=True
    )
    allow_changed: list[str] = setting([], "What may differ from the resumed checkpoint: keys of settings, data, code.")
    path: str | None = setting(None, "File or run directory that evaluate reads; checkpoint=PATH is its short form.")


@dataclass(frozen=True)
class TrackingConfig:
    """Logging in addition to the run directory, W&B and MLflow."""

    tensorboard: bool = setting(False, "Write TensorBoard event files to RUN/tensorboard.")
    prometheus: str | None = setting(
        None, "File NAME.prom, for node_exporter on rank 0's node, with the newest numbers of the run; null: none."
    )


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = setting(
        "auto", "auto: the value of WANDB_MODE, else online if an API key is configured, else offline."
    )
    project: str | None = setting(None, "Project of the run; null: WANDB_PROJECT, else distlenet.")
    entity: str | None = setting(None, "User or team; null: WANDB_ENTITY, else the owner of the API key.")
    group: str | None = setting(None, "Group of runs.")
    tags: list[str] = setting([], "Tags of the run.")
    notes: str | None = setting(None, "Notes on the run.")
    log_checkpoints: bool = setting(
        False, "Upload the best checkpoint as an artifact, or the last one if there is no validation set."
    )
    finish_timeout_s: float = setting(
        15.0, "Seconds for uploads at the end of a job; report --replay-wandb sends the rest.", ge=0, lt=10**6
    )


@dataclass(frozen=True)
class MlflowConfig:
    """MLflow."""

    enabled: bool = setting(False, "Send the records to MLflow.")
    tracking_uri: str | None = setting(
        None,
        "Address of the server, such as http://HOST:5000; or, with the full package mlflow, a database such as "
        "sqlite:///mlflow.db; null: MLFLOW_TRACKING_URI.",
    )
    experiment: str | None = setting(None, "Experiment of the run; null: MLFLOW_EXPERIMENT_NAME, else distlenet.")


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    seed: int = setting(0, "Seed of initial weights, order and augmentation.", ge=0, lt=2**32, result=True)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto", "auto: bf16 if the GPU supports it, else fp16; fp32 on CPU.", result=True
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: one GPU per rank if there are GPUs, else CPU.")
    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)
    wandb: WandbConfig = dataclasses.field(default_factory=WandbConfig)
    mlflow: MlflowConfig = dataclasses.field(default_factory=MlflowConfig)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as nested dicts of plain values."""
        return dataclasses.asdict(self)
