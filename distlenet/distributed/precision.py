"""Numbers in the forward pass: full, or mixed precision by autocast and loss scaling."""

import torch

from distlenet.utils.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(wanted: str, device: torch.device) -> str:
    """Resolve ``auto``: bf16 where the GPU computes in it, else fp16; fp32 on CPU.

    Raises UserError for a precision that the device does not have.
    """
    if device.type == "cpu":
        if wanted == "fp16":
            raise UserError("precision=fp16: needs a GPU; on CPU give precision=fp32 or bf16")
        return "fp32" if wanted == "auto" else wanted
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "bf16" and not native:
        raise UserError("precision=bf16: this GPU does not compute in bf16; give precision=fp16 or fp32")
    return ("bf16" if native else "fp16") if wanted == "auto" else wanted


def use_deterministic_kernels() -> None:
    """Have cuDNN compute fp32 in fp32, not in TF32, and choose kernels that give the same bits each time.

    Source: https://docs.pytorch.org/docs/stable/notes/randomness.html
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return autocast for the forward pass and the loss; for fp32 it does nothing."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Return the loss scaler of fp16; for the other precisions one that does nothing.

    Source: https://docs.pytorch.org/docs/stable/notes/amp_examples.html
    """
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
