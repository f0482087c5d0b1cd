"""Matrix products of image towers by oneDNN, where that is faster than MKL.

torch multiplies float32 matrices by MKL, which chooses its code by the maker of the processor. On
processors of AMD it leaves the instructions of AVX-512 unused. oneDNN, which is a part of torch,
uses them: ViT-B/32 then takes 0.74 of the time per image. ``nn.MultiheadAttention`` still
multiplies by MKL, because torch runs it as one function, which ``LinearByOneDNN`` does not reach.
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


class LinearByOneDNN(TorchFunctionMode):
    """Mode in which ``functional.linear`` of float32 tensors runs by oneDNN, in this thread."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - that of ``func``
        """Call ``func``, or the product of oneDNN in its place."""
        kwargs = kwargs or {}
        if func is functional.linear:
            return _linear(*args, **kwargs)
        return func(*args, **kwargs)


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows (..., F_in) times the transpose of weight (F_out, F_in), plus bias (F_out,)."""
    if rows.dtype != torch.float32 or weight.dtype != torch.float32:
        return functional.linear(rows, weight, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


def fast_products(device: torch.device) -> AbstractContextManager[object]:
    """Context in which the linear layers on a device run by oneDNN, if that is faster there.

    The context has an effect only in the calling thread. Products that are computed in it cannot be
    differentiated. While a model is exported, it does nothing, because ONNX has no such product.
    """
    if device.type == "cpu" and is_onednn_faster() and not torch.compiler.is_exporting():
        return LinearByOneDNN()
    return nullcontext()


@cache
def is_onednn_faster() -> bool:
    """Whether torch has both libraries, and the processor is one of AMD with AVX-512."""
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    has_product = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)  # not in every version of torch
    if not has_both or not has_product or get_capabilities is None:
        return False
    capabilities = get_capabilities()
    is_amd = "AMD" in str(capabilities.get("cpu_name", ""))
    return is_amd and bool(capabilities.get("avx512_f", False))
