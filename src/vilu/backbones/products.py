"""Matrix products in image towers by oneDNN, on processors where oneDNN is faster than MKL.

torch multiplies float32 matrices by MKL. MKL chooses code by the processor's maker, and does not
use AVX-512 instructions on AMD processors. oneDNN, a part of torch, uses these instructions:
ViT-B/32 then takes 74 % of the time per image. ``nn.MultiheadAttention`` still multiplies by MKL,
because torch runs attention as a single function. ``ProductsByOneDNN`` cannot change the products
in this function.

A convolution with a one-pixel kernel is a product, too. With a single thread, torch runs this
convolution by oneDNN only for batches of at least 16 images. Without this module, an image in a
smaller batch takes 1.6 times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class ProductsByOneDNN(TorchFunctionMode):
    """Mode for computing products of float32 tensors by oneDNN, in this thread.

    The products are ``functional.linear``, and ``functional.conv2d`` with a one-pixel kernel.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - the type that ``func`` returns
        """Call ``func``. For a product, call oneDNN's product instead."""
        kwargs = kwargs or {}
        if func is functional.linear:
            return _linear(*args, **kwargs)
        if func is functional.conv2d:
            return _convolution(*args, **kwargs)
        return func(*args, **kwargs)


def _linear(
    input: Tensor,  # noqa: A002 - the name in torch
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply rows (..., F_in) by the transposed weight (F_out, F_in), and add bias (F_out,)."""
    if input.dtype != torch.float32 or weight.dtype != torch.float32:
        return functional.linear(input, weight, bias)
    # the last three arguments mean that no activation follows
    product: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return product


def _convolution(
    input: Tensor,  # noqa: A002 - the name in torch
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | str | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    """Compute ``functional.conv2d``.

    oneDNN computes the result for images (B, C, H, W) and a one-pixel kernel.
    """
    is_float32 = input.dtype == weight.dtype == torch.float32
    has_one_pixel_kernel = weight.shape[2:] == (1, 1)
    is_product = input.dim() == 4 and has_one_pixel_kernel and groups == 1
    # ``nn.Conv2d`` passes these tuples if stride and padding are the defaults
    is_plain = stride == (1, 1) and padding == (0, 0)
    if is_float32 and is_product and is_plain:
        product: Tensor = torch.ops.aten.mkldnn_convolution(
            input, weight, bias, padding, stride, dilation, groups
        )
        return product
    return functional.conv2d(input, weight, bias, stride, padding, dilation, groups)


def fast_products(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which oneDNN computes products on a device, if oneDNN is faster there.

    The context has an effect only in the calling thread. Products from this context cannot be
    differentiated. While a model is exported, the context does nothing, because ONNX has no oneDNN
    product.
    """
    if device.type == "cpu" and is_onednn_faster() and not torch.compiler.is_exporting():
        return ProductsByOneDNN()
    return nullcontext()


@cache
def is_onednn_faster() -> bool:
    """Return whether torch has MKL and oneDNN, and the processor is from AMD and has AVX-512."""
    has_both_libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    has_product = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)  # not in every torch version
    if not has_both_libraries or not has_product or get_capabilities is None:
        return False
    capabilities = get_capabilities()
    is_amd = "AMD" in str(capabilities.get("cpu_name", ""))
    return is_amd and bool(capabilities.get("avx512_f", False))
