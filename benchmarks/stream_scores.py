"""Scores and evaluates 10 million image-caption pairs on disk, part by part, and measures memory.

D = 64, Linux only. The pairs are in LAION's layout in float16 (2.6 GB in a temporary folder). There
are two memory peaks: the peak of anonymous memory (allocated by the program), and the peak of all
resident pages. Resident pages include pages of mapped files, which the system can remove. Both
peaks are measured above the memory after a first small run, with libraries and predictor loaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

N, D, POOL, SHARD = 10_000_000, 64, 128, 1_000_000
METRICS = ("auroc", "fpr95")


def make(root: Path, n: int, seed: int) -> None:
    """Write pairs, half of them blurred. The last coordinate marks an image as blurred."""
    rng = np.random.default_rng(seed)
    for name in ("img_emb", "text_emb"):
        (root / name).mkdir(parents=True)
    for number, start in enumerate(range(0, n, SHARD)):
        rows = min(SHARD, n - start)
        maps = [
            np.lib.format.open_memmap(
                root / name / f"{name}_{number:04d}.npy",
                mode="w+",
                dtype=np.float16,
                shape=(rows, D),
            )
            for name in ("img_emb", "text_emb")
        ]
        for first in range(0, rows, 100_000):
            block = slice(first, min(first + 100_000, rows))
            text = rng.standard_normal((block.stop - first, D), dtype=np.float32)
            text[:, -1] = 0
            text /= np.linalg.norm(text, axis=1, keepdims=True)
            blur = rng.random((len(text), 1), dtype=np.float32) * 0.6
            image = text + blur * rng.standard_normal(text.shape, dtype=np.float32)
            image[:, -1] = 2 * blur[:, 0]
            maps[0][block] = image / np.linalg.norm(image, axis=1, keepdims=True)
            maps[1][block] = text


def status_mb(name: str) -> float:
    """Read a line of /proc/self/status, and return the value in MB."""
    status = Path("/proc/self/status").read_text()
    line = next(text for text in status.splitlines() if text.startswith(name))
    return int(line.split()[1]) / 1024


class AnonymousPeak(threading.Thread):
    """Reads RssAnon a hundred times a second, because the kernel does not store the peak."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.done = 0.0, threading.Event()

    def run(self) -> None:
        """Read until the thread is told to stop."""
        while not self.done.wait(0.01):
            self.peak = max(self.peak, status_mb("RssAnon"))


def child(data: str, small: str, out: str, method: str) -> None:
    """Fit on a few rows, then score and evaluate all rows. Print memory and figures as JSON."""
    import vilu
    from vilu.embeddings.pairs import Pools
    from vilu.scoring.score import score_parts
    from vilu.store.reader import open_source

    pools = Pools(POOL, seed=None)
    few = open_source(small, pools=pools, logit_scale=30.0)
    predictor = vilu.MCM() if method == "mcm" else vilu.ViLU(hidden=(128, 64), epochs=2).fit(few)
    vilu.evaluate(score_parts(predictor, few, Path(out) / "few"), n_resamples=10)
    Path("/proc/self/clear_refs").write_text("5")
    before, anonymous = status_mb("VmHWM"), status_mb("RssAnon")
    watch = AnonymousPeak()
    watch.start()
    start = time.perf_counter()
    source = open_source(data, pools=pools, logit_scale=30.0)
    n_usable = len(source.usable_rows)
    checked = time.perf_counter()
    folder = score_parts(predictor, source, Path(out) / "all")
    scored = time.perf_counter()
    table = vilu.evaluate(folder)
    evaluated = time.perf_counter()
    watch.done.set()
    watch.join()
    figures = {
        "rows": n_usable,
        "check_s": checked - start,
        "score_rows_per_s": n_usable / (scored - checked),
        "evaluate_s": evaluated - scored,
        "peak_anonymous_mb": watch.peak - anonymous,
        "peak_resident_mb": status_mb("VmHWM") - before,
        "bins": len(folder.histogram.bins),
        "level": folder.histogram.level,
        "accuracy": table.rows[0].accuracy,
        **{name: table.value(name) for name in METRICS},
        "auroc_ci": [
            table.filter(metric="auroc").rows[0].ci_low,
            table.filter(metric="auroc").rows[0].ci_high,
        ],
    }
    print(json.dumps(figures))


def errors(out: Path) -> dict[str, float]:
    """Compare metrics from the histogram with metrics from all rows at once."""
    from vilu.artifacts.tables import read_table
    from vilu.metrics import METRICS as KNOWN
    from vilu.metrics.counts import tie_counts
    from vilu.scoring.score_folder import ScoreFolder

    folder = ScoreFolder(out / "all")
    tables = [read_table(out / "all" / part.scores_file, ())[0] for part in folder.run.parts]
    columns = []
    for name in ("uncertainty", "failure"):
        parts = [table[name].drop_null().to_numpy(zero_copy_only=False) for table in tables]
        columns.append(np.concatenate(parts))
    exact, counts = tie_counts(*columns), folder.histogram.counts()
    return {
        name: abs(float(KNOWN[name].kernel(exact)) - float(KNOWN[name].kernel(counts)))
        for name in METRICS
    }


def main(n: int = N) -> dict[str, float]:
    """Make and score pairs with two methods, each in a separate process, and print the figures."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="vilu-stream-") as folder:
        root = Path(folder)
        make(root / "data", n, 0)
        make(root / "small", 20 * 1024, 1)
        for method in ("mcm", "vilu"):
            out = root / method
            out.mkdir()
            arguments = tuple(map(str, (root / "data", root / "small", out, method)))
            code = f"from benchmarks.stream_scores import child; child(*{arguments!r})"
            limit_to_one_thread = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
            }  # a pool's products are too small for several threads
            command = [sys.executable, "-c", code]
            done = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, check=True, env=limit_to_one_thread
            )
            figures = json.loads(done.stdout)
            error = errors(out)
            size = sum(path.stat().st_size for path in (out / "all").rglob("*") if path.is_file())
            print(
                f"stream scores, {method}, {figures['rows']:,} pairs, D={D}, pools of {POOL}: "
                f"{figures['score_rows_per_s']:,.0f} rows/s on one thread (before, "
                "a check of all rows in "
                f"{figures['check_s']:.0f} s), evaluated with 1,000 resamples in "
                f"{figures['evaluate_s']:.1f} s; "
                f"peak above the program: "
                f"{figures['peak_anonymous_mb']:,.0f} MB anonymous, "
                f"{figures['peak_resident_mb']:,.0f} MB with mapped "
                f"files; {size / figures['rows']:.0f} bytes a row on disk\n"
                f"  {figures['bins']:,} bins; accuracy {figures['accuracy']:.4f}, "
                f"AUROC {figures['auroc']:.6f} "
                f"{figures['auroc_ci']}, FPR95 {figures['fpr95']:.6f}; off the exact values by "
                f"{error['auroc']:.1e} and {error['fpr95']:.1e}"
            )
            found[f"stream_{method}_rows_per_s"] = figures["score_rows_per_s"]
            found[f"stream_{method}_peak_anonymous_mb"] = figures["peak_anonymous_mb"]
            found[f"stream_{method}_auroc_error"] = error["auroc"]
    return found


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
