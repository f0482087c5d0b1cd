"""The time to compare a store's bytes with the receipts, in ``score`` with 1 GB at K = 1,000.

The store has a million float16 rows (D = 512) in parts with 4,096 rows, in the page cache. The
store is opened and scored with and without the comparison, in turn. A ratio compares two
neighbouring runs, so other work on the machine affects both runs.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

N, D, K, PART_ROWS = 1_000_000, 512, 1_000, 4_096
REPEATS = 3


def make(root: Path, n: int) -> None:
    """Make a store as with ``vilu embed``, written by the store's ledger."""
    from vilu.artifacts.hashing import digest
    from vilu.embeddings.space import EmbeddingSpace
    from vilu.store.ledger import content_hash
    from vilu.store.manifest import IMAGE, Manifest, Run, StoreInputs
    from vilu.store.parts import (
        ImageMetadata,
        PartContent,
        StoreLedger,
        read_classes,
        write_classes,
    )

    rng = np.random.default_rng(0)
    names = tuple(f"class {i}" for i in range(K))
    inputs = StoreInputs(
        dataset_fingerprint="noise",
        n_in=n,
        split=None,
        space=EmbeddingSpace(D, 100.0),
        names=names,
        folders=names,
        templates=("a photo of a {}.",),
        limits={},
        part_size=PART_ROWS,
        dtype="float16",
    )
    fingerprint = digest(inputs.fingerprint_fields())
    run = Run(**dict(inputs), fingerprint=fingerprint, dataset="noise", vilu="0")
    ledger = StoreLedger(root, run)
    root.mkdir()
    ledger.begin(run, StoreLedger.required_folders)
    text = torch.from_numpy(rng.standard_normal((K, D), dtype=np.float32))
    write_classes(root, run, torch.nn.functional.normalize(text), {})
    receipts = []
    for part in ledger.parts:
        rows = torch.from_numpy(rng.standard_normal((len(part), D), dtype=np.float32))
        content = PartContent({IMAGE: [torch.nn.functional.normalize(rows).half()]})
        content.metadata = [
            ImageMetadata(i, f"{i:09d}.jpg", i % K, 64, 64, 1, None, 0, None, bytes(16))
            for i in range(part.start, part.stop)
        ]
        receipts.append(ledger.write_part(part, content, 1, ""))
    counts = {"n_in": n, "n_ok": n, "n_error": 0, "errors": {}}
    classes = read_classes(root, run)[0].hash
    manifest = Manifest(
        **dict(run) | counts,
        parts=len(receipts),
        classes=classes,
        content=content_hash(receipts),
    )
    ledger.seal(manifest)


def seconds(root: Path, *, verified: bool) -> tuple[float, float]:
    """Open and score a store. Return seconds by the clock and by the processor."""
    import vilu
    from vilu.store import ledger

    ledger._verified_files.clear()
    start, busy = time.perf_counter(), time.process_time()
    with patch.object(ledger, "require_hash", ledger.require_hash if verified else lambda *_: None):
        predictor = vilu.MCM()
        store = vilu.EmbeddingStore(root)
        vilu.score(predictor, store)
    return time.perf_counter() - start, time.process_time() - busy


def main(n: int = N, repeats: int = REPEATS) -> dict[str, float]:
    """Print and return median ratios, and the seconds per GB for the comparison."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="vilu-verified-") as folder:
        root = Path(folder) / "s"
        make(root, n)
        gigabytes = sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) / 1e9
        runs: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for repeat in range(repeats):
            for verified in (bool(repeat % 2), not repeat % 2):
                runs[verified].append(seconds(root, verified=verified))
    found: dict[str, float] = {}
    for place, what in enumerate(("clock", "processor")):
        pairs = [
            (with_it[place], plain[place])
            for with_it, plain in zip(runs[True], runs[False], strict=True)
        ]
        ratios = sorted(checked / plain for checked, plain in pairs)
        costs = sorted((checked - plain) / gigabytes for checked, plain in pairs)
        found[f"verified_scores_{what}_ratio"] = statistics.median(ratios)
        found[f"verified_scores_{what}_s_per_gb"] = statistics.median(costs)
        print(
            f"verified scores, {what}: {n:,} rows, D={D}, K={K}, {gigabytes:.2f} GB, one thread: "
            f"{statistics.median(plain for _, plain in pairs):.1f} s without the comparison; "
            "with it "
            f"{statistics.median(ratios):.3f} of that ({ratios[0]:.3f} to {ratios[-1]:.3f}), or "
            f"{statistics.median(costs):+.2f} s per GB ({costs[0]:+.2f} to {costs[-1]:+.2f}); "
            f"medians of {repeats} pairs"
        )
    return found


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
