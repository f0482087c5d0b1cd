"""Compares training on large caption pools with the dense computation.

Memory, time and agreement are measured (D = 512, float32, Linux only). "Dense" is the head as in
the paper: a similarity matrix for the answers, a matrix for softmax(s q k.T), the concatenation,
and a linear layer. "Ours" never has a pool x pool matrix in memory.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.floor import per_step, products
from benchmarks.memory import peak_mb
from vilu.embeddings.memory import PairEmbeddings
from vilu.embeddings.rows import Rows
from vilu.embeddings.similarity import MAX_TILE_LOGITS, TILE_ROWS
from vilu.predictors.nn.head import HIDDEN_WIDTHS, FailureHead, fused_attention
from vilu.predictors.nn.losses import FailureWeight, bce_loss, weighted_bce
from vilu.predictors.nn.train import HeadTrainer, TrainConfig

D, SCALE, REPEATS = 512, 100.0, 5
MEMORY_POOL, LABEL_POOL, TIME_POOL = 32_768, 8_192, 4_096
"""Pool sizes to measure memory, to compare labels, and to compare times."""

LIMIT_MB, TOLERANCE = 1_536, 1e-5


def random_pairs(n: int) -> PairEmbeddings:
    """Make a pool of random captions and images in blocks, so that memory has no peak before."""
    rng = np.random.default_rng(0)
    image, text = np.empty((n, D), np.float32), np.empty((n, D), np.float32)
    for start in range(0, n, 1024):
        block = slice(start, start + 1024)
        text[block] = unit_rows(rng.standard_normal(text[block].shape, np.float32))
        noise = unit_rows(rng.standard_normal(text[block].shape, np.float32))
        image[block] = unit_rows(text[block] + noise * 8 * rng.random((len(noise), 1), np.float32))
    return PairEmbeddings(image, text, n, SCALE)


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Scale rows to unit norm."""
    normed: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return normed


def config(pool: int, device: str) -> TrainConfig:
    """Return settings: a pool per step, and a learning rate so small that steps change little."""
    torch_device = torch.device(device)
    return TrainConfig(1, pool, 1e-3, 0.9, 5e-4, 1, 0, None, "fp32", 0, torch_device)


def tiled_step(data: PairEmbeddings, device: str = "cpu") -> Callable[[], float]:
    """Return a function that makes a training step of the library and returns the loss.

    The step has batch, answers, head, weighted BCE, backward pass and SGD.
    """
    torch.manual_seed(0)
    head = FailureHead(D)
    weight = FailureWeight("batch", 0.5)
    loss = bce_loss(weight)
    settings = config(len(data), device)
    trainer = HeadTrainer(head, loss, settings)
    trainer.unfreeze_attention()
    index = torch.arange(len(data))
    rows = Rows(data, index)
    return lambda: float(trainer.step(next(rows.steps(len(data))), 1e-3))


class Dense(nn.Module):
    """The same head with the same weights, written as in the paper."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        torch.manual_seed(0)
        head = FailureHead(D)
        self.query, self.key = nn.Parameter(torch.eye(D)), nn.Parameter(torch.eye(D))
        self.first = nn.Linear(3 * D, HIDDEN_WIDTHS[0])
        with torch.no_grad():
            parts = [head.first[part] for part in ("image", "attended", "caption")]
            first_weight = torch.cat(parts, dim=1)
            self.first.weight.copy_(first_weight)
            self.first.bias.copy_(head.first_bias)
        self.rest = head.rest

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return failure logits (B,), and zero-shot answers (B,)."""
        with torch.no_grad():
            answer = (self.scale * image @ text.T).softmax(dim=1).argmax(dim=1)
        key = text @ self.key.T
        attended = torch.softmax(self.scale * (image @ self.query.T) @ key.T, dim=1) @ key
        logit: Tensor = self.rest(self.first(torch.cat([image, attended, text[answer]], dim=1)))
        return logit.squeeze(1), answer


def dense_step(data: PairEmbeddings) -> Callable[[], float]:
    """Return a function that makes a training step of the dense head and returns the loss."""
    head, weight, target = Dense(SCALE), FailureWeight("batch", 0.5), torch.arange(len(data))
    parameters = head.parameters()
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=True)

    def step() -> float:
        logit, answer = head(data.image, data.text)
        failure = (answer != target).long()
        weights = weight(failure)
        loss = weighted_bce(logit, failure, weights)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def child(step_name: str) -> None:
    """Run a step. Print seconds, peak memory above the data, and seconds of the products.

    A step has six products, pool x D x pool, here in tiles. Three are similarities: for the
    answers, for the attention, and for the attention's gradient. The rest are averages of texts,
    gradients of weights, and gradients of queries.
    """
    import vilu

    small, data = (
        random_pairs(1024),
        random_pairs(MEMORY_POOL),
    )  # the small pool warms up thread pools and libraries
    vilu_fitted = vilu.ViLU(epochs=1).fit(PairEmbeddings(small.image, small.text, 128, SCALE))
    vilu_fitted.similarity_ = None  # more candidates have larger cosines with the same model
    runs: dict[str, Callable[[PairEmbeddings], object]] = {
        "step": lambda pool: tiled_step(pool)(),
        "vilu": vilu_fitted.predict_uncertainty,
        "mcm": vilu.MCM().predict_uncertainty,
    }
    runs[step_name](small)
    Path("/proc/self/clear_refs").write_text("5")
    before, start = peak_mb(), time.perf_counter()
    runs[step_name](data)
    seconds, peak = time.perf_counter() - start, peak_mb() - before
    rows, columns = TILE_ROWS, MAX_TILE_LOGITS // TILE_ROWS
    tiles = [*[(rows, D, columns)] * 4, *[(rows, columns, D)] * 2]
    floor = (
        per_step(products(tiles, MEMORY_POOL**2 // MAX_TILE_LOGITS), 1)
        if step_name == "step"
        else math.nan
    )
    print(seconds, peak, floor)


def memory() -> dict[str, float]:
    """Measure peak memory above the data. Each step runs in a separate process."""
    figures = {}
    for step_name, name in (
        ("step", "training step"),
        ("vilu", "scoring by ViLU"),
        ("mcm", "scoring by MCM"),
    ):
        command = f"from benchmarks.contrast import child; child({step_name!r})"
        done = subprocess.run(
            [sys.executable, "-c", command], capture_output=True, text=True, check=True
        )
        seconds, peak, floor = map(float, done.stdout.split())
        share = (
            ""
            if math.isnan(floor)
            else f", {floor / seconds:.2f} of its products, "
            f"{6 * MEMORY_POOL**2 * D * 2e-12:.1f} TFLOP"
        )
        print(
            f"  pool {MEMORY_POOL:,}, {name}: {seconds:.1f} s{share}, "
            f"{peak:,.0f} MB above the data (at most {LIMIT_MB:,})"
        )
        figures[f"contrast_{step_name}_mb"] = peak
        if step_name == "step":
            figures["contrast_step_products"] = floor / seconds
    return figures


def times() -> dict[str, float]:
    """Time a training step in seconds, dense and ours in turn. The first pair warms up."""
    data = random_pairs(TIME_POOL)
    steps = {"dense": dense_step(data), "ours": tiled_step(data)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses = {}
    for repeat in range(REPEATS + 1):
        for name in sorted(steps, reverse=bool(repeat % 2)):
            start = time.perf_counter()
            loss = steps[name]()
            if repeat:
                elapsed = time.perf_counter() - start
                seconds[name].append(elapsed)
            else:
                losses[name] = loss
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = statistics.median(o / d for o, d in zip(seconds["ours"], seconds["dense"], strict=True))
    print(
        f"  pool {TIME_POOL:,}, training step: dense {medians['dense']:.2f} s, "
        f"ours {medians['ours']:.2f} s, ours / dense "
        f"{ratio:.2f} (at most 1); first losses {losses['dense']:.7f} and {losses['ours']:.7f}"
    )
    return {"contrast_step_vs_dense": ratio}


def agreement() -> dict[str, float]:
    """Count labels that differ from dense labels. Measure attention and gradient errors."""
    data = random_pairs(LABEL_POOL)
    (batch,) = data.steps(LABEL_POOL)
    answer = (SCALE * data.image @ data.text.T).argmax(dim=1)
    failure = (answer != torch.arange(LABEL_POOL)).long()
    n_different = int((answer != batch.prediction).sum() + (failure != batch.failure).sum())
    image, text = data.image[:TIME_POOL], data.text[:TIME_POOL]
    generator = torch.Generator().manual_seed(0)
    output_gradient = torch.randn(image.shape, generator=generator)
    results = {}
    for dtype, attention in ((torch.float32, fused_attention), (torch.float64, plain_attention)):
        query = image.to(dtype, copy=True).requires_grad_()
        keys = text.to(dtype)
        attended = attention(query, keys, keys, SCALE)
        (gradient,) = torch.autograd.grad(attended, query, output_gradient.to(dtype))
        results[dtype] = attended.detach().double(), gradient.double() / gradient.abs().max()
    errors = [float((a - b).abs().max()) for a, b in zip(*results.values(), strict=True)]
    print(
        f"  pool {LABEL_POOL:,}: {n_different} labels differ from dense ones "
        f"({int(failure.sum()):,} failures); pool {TIME_POOL:,}: "
        f"attention within {errors[0]:.1e} of float64, its gradient within {errors[1]:.1e} of the "
        "largest "
        f"(at most {TOLERANCE})"
    )
    return {
        "contrast_labels_differ": n_different,
        "contrast_attention_error": errors[0],
        "contrast_gradient": errors[1],
    }


def plain_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Compute the attention by the formula, without tiles."""
    return functional.softmax(scale * query @ keys.T, dim=1) @ values


def main() -> dict[str, float]:
    """Print and return the figures."""
    print(f"pools of captions, D={D}, {torch.get_num_threads()} threads, medians of {REPEATS}")
    return agreement() | times() | memory()


if __name__ == "__main__":
    main()
