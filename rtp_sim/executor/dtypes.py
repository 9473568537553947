"""Names of the IR's dtypes and the torch dtypes that stand for them."""

from __future__ import annotations

import torch

DTYPES = {
    "fp64": torch.float64, "fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn, "uint8": torch.uint8, "int8": torch.int8, "int32": torch.int32, "int64": torch.int64,
}  # fmt: skip


def torch_dtype(name: str, float_dtype: torch.dtype | None = None) -> torch.dtype:
    """The torch dtype of an IR dtype; `float_dtype` replaces every floating-point one (for exactness tests)."""
    dtype = DTYPES[name]
    return float_dtype if float_dtype is not None and dtype.is_floating_point else dtype


def accurate(x: torch.Tensor) -> torch.Tensor:
    """The numbers in at least fp32, in which sums over many elements are taken."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
