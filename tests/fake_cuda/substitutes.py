"""Operators for which PyTorch calls cuDNN, which cannot work here: the launches that it would make."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from fake_cuda import runtime

aten = torch.ops.aten
LIBRARY = torch.library.Library("aten", "IMPL")


def _convolution(args: Any) -> list[str]:
    return ["convolution_forward"] if args[2] is None else ["convolution_forward", "add_bias"]


def _convolution_backward(args: Any) -> list[str]:
    parts = zip(("data", "weight", "bias"), args[-1], strict=True)
    return [f"convolution_backward_{part}" for part, wanted in parts if wanted]


def _batch_norm_launches(_: Any) -> list[str]:
    return ["batch_norm"]


LAUNCHES: dict[Any, Callable[[Any], list[str]]] = {
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
    aten.cudnn_batch_norm.default: _batch_norm_launches,
    aten.cudnn_batch_norm_backward.default: _batch_norm_launches,
}


def register() -> None:
    """Let PyTorch call the substitutes for CUDA tensors."""
    with warnings.catch_warnings():  # torch 2.11 warns of what is allowed here
        warnings.simplefilter("ignore")
        for func, names in LAUNCHES.items():
            substitute = functools.partial(_run, func, names)
            LIBRARY.impl(func._schema.name, substitute, "CUDA", allow_override=True)


def _run(func: Any, names: Callable[[Any], list[str]], *args: Any) -> Any:
    """Make the launches of an operator and allocate its outputs."""
    stream = torch._C._cuda_getCurrentRawStream(args[0].get_device())
    for name in names(args):
        if runtime.launch(f"cudnn::{name}".encode(), stream):
            raise RuntimeError(f"CUDA error in cudnn::{name}")
    shapes = func(*_meta(args))
    if isinstance(shapes, Tensor):
        return _allocate(shapes, args[:2])
    return tuple(None if shape is None else _allocate(shape, args[:3]) for shape in shapes)


def _allocate(like: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
    """Allocate an output of an operator of images: channels last if an argument is, as cuDNN does."""
    last = like.dim() == 4 and any(_channels_last(tensor) for tensor in tensors if tensor is not None)
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(like.size(), dtype=like.dtype, device=tensors[0].device, memory_format=memory_format)


def _channels_last(tensor: Tensor) -> bool:
    """Also for one channel, where only the strides tell."""
    return suggest_memory_format(tensor) is torch.channels_last


def _meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
    return type(value)(_meta(part) for part in value) if isinstance(value, list | tuple) else value


def _batch_norm(x, weight, bias, mean, var, training, momentum, epsilon):
    result = aten.native_batch_norm(x, weight, bias, mean, var, training, momentum, epsilon)
    return *result, torch.empty(0, dtype=torch.uint8)


def _batch_norm_backward(x, grad, weight, mean, var, saved_mean, saved_inverse, epsilon, reserve):
    return aten.native_batch_norm_backward(
        grad, x, weight, mean, var, saved_mean, saved_inverse, True, epsilon, [True, True, True]
    )


def _log_sigmoid_backward(grad, x, buffer):
    return aten.log_sigmoid_backward(grad, x, aten.log_sigmoid_forward(x)[1])  # the GPU keeps no buffer


ON_HOST = {
    aten.log_sigmoid_backward.default: _log_sigmoid_backward,
    aten.cudnn_batch_norm.default: _batch_norm,
    aten.cudnn_batch_norm_backward.default: _batch_norm_backward,
}


def on_host(func: Any) -> Any:
    """Return what computes the operator on the CPU."""
    return ON_HOST.get(func, func)
