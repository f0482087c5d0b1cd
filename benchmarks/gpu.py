"""``make bench-gpu``: times and memory on an accelerator, compared with plain products.

    python -m benchmarks.gpu [DEVICE] [--small]

This is not part of ``make bench``. With ``--small`` and the device "cpu" the only purpose is to
test the code.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vilu
from benchmarks import contrast, head_training, plus_speed
from benchmarks.floor import products
from vilu.predictors.contract.parameters import build_predictor

REPEATS = 5


def seconds(run: Callable[[], object], device: str) -> float:
    """Return the shortest time among several runs. A run ends when the device has finished."""
    times = []
    for _ in range(REPEATS + 1):
        wait_for_device(device)
        start = time.perf_counter()
        run()
        wait_for_device(device)
        elapsed = time.perf_counter() - start
        times.append(elapsed)
    return min(times[1:])


def wait_for_device(device: str) -> None:
    """Wait until the device has finished."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def report_rate(title: str, seconds: float, floor: float, device: str) -> float:
    """Print and return the time of plain products, ``floor``, divided by the time ``seconds``."""
    memory = (
        f", {torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MB at most"
        if device.startswith("cuda")
        else ""
    )
    print(
        f"  {title}: {seconds * 1e3:,.2f} ms, {floor / seconds:.2f} of its products{memory}",
        flush=True,
    )
    return floor / seconds


def head_steps(device: str) -> dict[str, float]:
    """Time training steps of the head in float32, in TF32 and in bfloat16."""
    figures: dict[str, float] = {}
    data, k = head_training.embeddings(10), 10
    for b in (128, 1_024, 8_192):
        steps = 8_192 // b
        for name, precision, allowed in (
            ("fp32", "fp32", False),
            ("tf32", "fp32", True),
            ("bf16", "bf16", False),
        ):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            dtype = torch.bfloat16 if name == "bf16" else torch.float32
            executed = head_training.executed_products(b, k)
            floor = products(executed, steps, device, dtype)
            step = head_training.vilu_epoch(data, b, precision, device)
            step_seconds = seconds(step, device)
            floor_seconds = seconds(floor, device)
            figures[f"gpu_head_{name}_{b}"] = report_rate(
                f"head, batch {b:,}, {name}, {steps} steps", step_seconds, floor_seconds, device
            )
    torch.backends.cuda.matmul.allow_tf32 = False
    return figures


def plus_scores(device: str, n: int, k: int) -> dict[str, float]:
    """Time scores and a ``vilu_plus`` fit. Scores from logits alone stay on the processor."""
    test, train = plus_speed.data(k, n, 2), plus_speed.data(k, n // 4, 1)
    start = time.perf_counter()
    predictor = build_predictor(vilu.PREDICTORS["vilu_plus"], {"device": device})
    predictor.fit(train)
    print(f"  vilu_plus, fit of {n // 4:,} rows, K = {k:,}: {time.perf_counter() - start:.1f} s")
    d, h = plus_speed.D, plus_speed.HIDDEN
    floor = seconds(products([(n, d, k), (n, d + 1, k), (n, d, h), (n, h, k)], 1, device), device)
    run = seconds(lambda: predictor.predict_uncertainty(test), device)
    return {
        "gpu_score_vilu_plus": report_rate(
            f"vilu_plus, scores of {n:,} rows, K = {k:,}", run, floor, device
        )
    }


class Downloads(TorchDispatchMode):
    """Measures the largest copy from the accelerator to the processor, in values."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - torch's own signature
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        """Run the operation. If the operation is a copy, also measure the size."""
        target = str((kwargs or {}).get("device"))
        is_copy = func is torch.ops.aten._to_copy.default
        if is_copy and args[0].is_cuda and target.startswith("cpu"):
            self.largest = max(self.largest, args[0].numel())
        return func(*args, **(kwargs or {}))


def bare_tensors(device: str, n: int, k: int) -> dict[str, float]:
    """Time scores for tensors on a device, and check that embeddings and scores stay there."""
    test = plus_speed.data(k, n, 2)
    image = test.image.to(device)
    text = test.text.to(device)
    predictor = vilu.MCM()
    predictor.fit(test)
    with Downloads() as downloads:
        uncertainty = predictor.predict_uncertainty(image, text)
    if uncertainty.device != image.device or downloads.largest > n:
        raise SystemExit(
            f"bench-gpu: scores lie on {uncertainty.device}, and one copy to the CPU has "
            f"{downloads.largest:,} numbers. Expected: {image.device}, and at most {n:,}."
        )
    floor = seconds(products([(n, plus_speed.D, k)], 1, device), device)
    run = seconds(lambda: predictor.predict_uncertainty(image, text), device)
    what = f"mcm, bare tensors of {n:,} rows, K = {k:,}"
    return {"gpu_bare_mcm": report_rate(what, run, floor, device)}


def pool_step(device: str, n: int) -> dict[str, float]:
    """Time a step on a caption pool, compared with the six pool x pool products."""
    step = contrast.tiled_step(contrast.random_pairs(n), device)
    floor = seconds(products([(n, contrast.D, n)] * 6, 1, device), device)
    step_seconds = seconds(step, device)
    return {"gpu_pool": report_rate(f"pool of {n:,}, one step", step_seconds, floor, device)}


def main(arguments: list[str]) -> dict[str, float]:
    """Print tables, and return the times of plain products divided by our times."""
    warnings.simplefilter("ignore")
    device = next((a for a in arguments if not a.startswith("-")), "cuda")
    small = "--small" in arguments
    if device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit(
            "bench-gpu: torch sees no CUDA device. Run it where there is one, or try `cpu --small`."
        )
    card = torch.cuda.get_device_name(device) if device.startswith("cuda") else "no accelerator"
    print(f"{card}, torch {torch.__version__}")
    figures = {} if small else head_steps(device)
    figures |= plus_scores(device, 8_000 if small else 200_000, 20 if small else 1_000)
    figures |= bare_tensors(device, 8_000 if small else 200_000, 20 if small else 1_000)
    return figures | pool_step(device, 512 if small else 32_768)


if __name__ == "__main__":
    main(sys.argv[1:])
