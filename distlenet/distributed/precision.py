"""The precision of the forward pass: float32, or mixed precision by autocast and loss scaling."""

import torch

from distlenet.utils.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(wanted: str, device: torch.device) -> str:
    """Resolve ``auto`` to bf16 if the GPU supports it, else fp16; to fp32 on CPU.

    Raise UserError if the device does not support ``wanted``.
    """
    if device.type == "cpu":
        if wanted == "fp16":
            raise UserError("precision=fp16: needs a GPU; on CPU set precision=fp32 or bf16")
        return "fp32" if wanted == "auto" else wanted
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "bf16" and not bf16:
        raise UserError("precision=bf16: this GPU does not support bf16; set precision=fp16 or fp32")
    return ("bf16" if bf16 else "fp16") if wanted == "auto" else wanted


def use_deterministic_kernels() -> None:
    """Make cuDNN compute float32 without TF32, by kernels that return the same bits each time.

    Source: https://docs.pytorch.org/docs/stable/notes/randomness.html
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return autocast for forward pass and loss, disabled for fp32."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Return the loss scaler, enabled for fp16 only."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
