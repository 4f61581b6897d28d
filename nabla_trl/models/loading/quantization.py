"""Quantized models whose gradients are those of their dequantized weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

_KNOWN_METHODS = ("bitsandbytes",)


def fix_quantized_gradients(model: PreTrainedModel, name: str) -> None:
    """Make the gradients of a 4-bit or 8-bit model those of its dequantized weights. Other models stay as they are.

    - On CPUs with AVX512-BF16, a forward pass without autograd repacks 4-bit weights for a kernel that has no backward
      pass, and gradients after it are silently wrong. The kernel is switched off.
    - 8-bit layers round the activations to 8 bits too, with outliers that depend on the rest of the batch. They now
      multiply by the dequantized weights instead.

    Raises:
        ValueError: weights that are repacked already, or another kind of quantization, whose gradients are not known
            to be right.
    """
    method = getattr(model, "quantization_method", None)
    if method is None:
        return
    if str(getattr(method, "value", method)) not in _KNOWN_METHODS:
        raise ValueError(
            f"{name} is quantized by {getattr(method, 'value', method)}, whose gradients are not known to be right: "
            "load its full weights, or a bitsandbytes model"
        )
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                raise ValueError(
                    f"the 4-bit weights of {name} were repacked by a forward pass without autograd, and have no right "
                    "gradients now: load the model again"
                )
        elif isinstance(module, Linear8bitLt) and not isinstance(module, _WeightOnlyInt8):
            # A class of bitsandbytes too, by which PEFT and transformers know the layer.
            base = type(module)
            module.__class__ = type(base.__name__, (_WeightOnlyInt8, base), {"__module__": base.__module__})


def is_quantized(model: PreTrainedModel) -> bool:
    """Return whether the weights are quantized, so that an adapter cannot be merged into them without rounding."""
    return getattr(model, "quantization_method", None) is not None


class _WeightOnlyInt8:
    """The forward pass of an 8-bit layer that multiplies by its dequantized weights."""

    weight: Any
    state: Any
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        codes = self.weight if self.weight.CB is None else self.weight.CB
        scales = self.state.SCB if self.weight.SCB is None else self.weight.SCB
        product = _Int8Product.apply(x, codes, scales)
        return product if self.bias is None else product + self.bias.to(product)


class _Int8Product(torch.autograd.Function):
    """x·Wᵀ of int8 weights W [out, in] with one scale per row. The backward pass dequantizes W again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return x @ _dequantize(codes, scales, x.dtype).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        codes, scales = ctx.saved_tensors
        return grads[0] @ _dequantize(codes, scales, grads[0].dtype), None, None


def _dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return (codes.float() * (scales.float() / 127)[:, None]).to(dtype)
