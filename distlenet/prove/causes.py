"""The usual cause of each difference, and its fix. docs/prove.md has the same table."""

from typing import NamedTuple


class Cause(NamedTuple):
    """Why a check fails, in most cases, and how to correct it."""

    hook: str  # what the user supplies and has to correct
    why: str
    fix: str


CAUSES = {
    "dataset again": Cause(
        "dataset",
        "the dataset holds a generator, a counter or another state; or something changes its samples in place",
        "draw from torch, random or numpy.random in __getitem__, which are seeded per sample; return copies",
    ),
    "dataset process": Cause(
        "dataset",
        "the samples depend on a generator that is seeded when it is made, on hash() or on the order of a set",
        "seed it with a constant, sort sets, and use hashlib instead of hash()",
    ),
    "order": Cause(
        "order of data",
        "the order in which the file system lists files: os.listdir, glob, iterdir",
        "sort what they return",
    ),
    "collate": Cause(
        "collate",
        "a sample is padded to the longest of the batch, or changed by its neighbors in another way",
        "return a list with one tensor per sample, and pad in Task.loss, with a mask after each layer; or pad to a "
        "fixed length",
    ),
    "transform again": Cause(
        "transform",
        "random numbers of a global generator, or a state that changes with each call",
        "draw from keys: Task.transform(data, keys); it must not change the data in place either",
    ),
    "transform alone": Cause(
        "transform",
        "a sample is changed by its neighbors: a statistic of the batch, one random number for all samples, padding",
        "compute each sample from its data and its key alone; compute statistics of the data set before",
    ),
    "model weights": Cause(
        "model",
        "the initial weights are drawn from another generator than torch's global one, or depend on the process",
        "initialise with torch.nn.init, or with generators that are seeded with config.seed",
    ),
    "model again": Cause(
        "model",
        "random numbers or a changing state in evaluation mode",
        "use them only if self.training; hold state in buffers",
    ),
    "model alone": Cause(
        "model",
        "the network mixes the samples of a batch in evaluation mode",
        "normalise over the features of a sample, or with statistics that are buffers (BatchNorm); mask padding after "
        "each layer",
    ),
    "model state": Cause(
        "model",
        "the network has a state that is not a buffer: an attribute that forward changes",
        "register it: self.register_buffer(name, tensor), and change it in place",
    ),
    "loss shape": Cause(
        "loss",
        "Task.loss returns the mean of the batch instead of one loss per sample",
        "reduction='none', then the mean over all dimensions but the first",
    ),
    "loss again": Cause(
        "loss",
        "random numbers or a changing state in Task.loss, in evaluation mode",
        "draw random numbers in Task.transform, from keys",
    ),
    "loss mean": Cause(
        "loss",
        "all samples have the same loss: the mean of the batch, expanded",
        "return the losses before averaging: reduction='none'",
    ),
    "loss alone": Cause(
        "loss",
        "the loss of a sample depends on the other samples: a statistic of the batch, in-batch negatives",
        "compute each loss from one sample; what spans samples must be one sample of the data",
    ),
    "metrics shape": Cause(
        "metrics",
        "Task.metrics returns a value of the batch instead of one value per sample",
        "return tensors (n,); the engine averages them exactly",
    ),
    "metrics alone": Cause(
        "metrics",
        "the value of a sample depends on the other samples: a ratio, a rank, an area under a curve",
        "return values per sample; compute metrics over all predictions in Task.summary_metrics",
    ),
    "raised": Cause("", "an exception, in a call with a few samples", "correct it, and run prove again"),
    "batches": Cause(
        "order of data",
        "the length of the dataset differs between processes",
        "make the list of samples from files that all ranks read, sorted",
    ),
    "raw samples": Cause(
        "dataset",
        "the samples depend on the rank, the worker or the calls before: a generator, a counter, a cache",
        "compute a sample from its index alone; draw from torch, random or numpy.random, seeded per sample",
    ),
    "transformed inputs": Cause(
        "transform",
        "random numbers that are not drawn from keys, or a value of the batch",
        "compute each sample from its data and its key alone",
    ),
    "initial weights": Cause(
        "model",
        "the initial weights depend on the rank or the process",
        "initialise with torch.nn.init; the engine seeds torch before Task.model",
    ),
    "replicas": Cause(
        "model",
        "the initial weights, or changes of weights or buffers in forward, depend on the rank",
        "initialise with torch.nn.init; let only the optimizer change parameters",
    ),
    "losses": Cause(
        "model",
        "a state that is not a buffer, random numbers of another generator than torch's, or the rank; in Task.model or "
        "Task.loss",
        "register state as buffers; hold no state in the task",
    ),
    "gradients": Cause(
        "model",
        "an operation of the backward pass is not deterministic, or has a state",
        "https://docs.pytorch.org/docs/stable/notes/randomness.html lists such operations",
    ),
    "weights": Cause(
        "model",
        "the optimizer or the forward pass changes something that no checkpoint contains",
        "keep it in parameters, buffers or the optimizer's state",
    ),
    "metrics": Cause(
        "metrics",
        "a state in Task.metrics, or values of the batch",
        "compute each value from the outputs and the data of one sample",
    ),
    "totals": Cause("metrics", "the set is evaluated in another way", "report this: the engine averages exactly"),
}
