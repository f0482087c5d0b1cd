"""Make src/vilu/assets/rates.csv from a finished run of configs/here/main.toml: what each method took per row.

    python tools/make_rates.py RUN

Microseconds per training row and pass, and per test row, on one core, with embeddings of width 768 and ten classes; of
the data set with most rows on which a method has a result. `vilu benchmark --dry-run` guesses times from them.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from vilu.benchmark.dry_run import passed_rows
from vilu.benchmark.study import load_studies

ASSET = Path(__file__).resolve().parents[1] / "src" / "vilu" / "assets" / "rates.csv"


def main(run: Path) -> None:
    """Write the asset."""
    (board,) = [board for board in load_studies(run) if board.config.name == "main"]
    rows: dict[str, tuple[int, float, float]] = {}
    for result in board.results.values():
        timing, name = result.timing, str(board.config.entries[result.method].method)
        n = result.results[0].n if result.results else 0
        if timing is None or (name in rows and rows[name][0] > n):
            continue
        fit = 0.0
        if timing.fit_seconds is not None and result.n_train is not None:
            fit = 1e6 * timing.fit_seconds / passed_rows(board.config, result.method, result.n_train)
        rows[name] = n, fit, 1e6 / timing.rows_per_second
    with ASSET.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "fit_us", "score_us"])
        writer.writerows([name, f"{fit:.3g}", f"{score:.3g}"] for name, (_, fit, score) in sorted(rows.items()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
