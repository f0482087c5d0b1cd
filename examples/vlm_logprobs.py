"""A language model answers questions about my pictures, with logprobs: which answers can I trust?

Reads completions in the format of OpenAI, as vLLM writes them, and makes a table of them: mean,
least and first log-probability of the tokens, and how many of three samples agree. The completions
are made up, by a model that knows an answer or guesses one; put your own file in their place.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np

import vilu
from vilu.metrics.ranking import auroc
from vilu.tables.methods import AnswerScores
from vilu.tables.sources import completion_answers

ANSWERS = ("a red car", "two dogs", "a bridge", "an old man", "snow", "a bus stop")
N = 1_800


def made_up(path: Path) -> dict[str, str]:
    """Write ``N`` lines of three samples each, and return the right answers by their ids."""
    random = np.random.default_rng(3)
    truth = {}
    lines = []
    for number in range(N):
        right = str(random.choice(ANSWERS))
        knowledge = random.beta(2, 1)  # how often a sample is right
        choices = []
        for _ in range(3):
            answer = right if random.random() < knowledge else str(random.choice(ANSWERS))
            doubt = np.exp(-3 * knowledge) + 0.05 * random.random()
            tokens = [
                {"token": word, "logprob": -doubt * random.exponential()} for word in answer.split()
            ]
            choices.append({"message": {"content": answer}, "logprobs": {"content": tokens}})
        lines.append(json.dumps({"id": f"question {number}", "choices": choices}))
        truth[f"question {number}"] = right
    path.write_text("\n".join(lines), encoding="utf-8")
    return truth


def main() -> None:
    """From a file of completions to decisions."""
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run.jsonl"
        truth = made_up(run)
        answers = completion_answers(run, truth)
    table = vilu.open_table(answers.columns)  # answers.write("answers.csv") keeps it
    fit, calibration, new = table[:600], table[600:1200], table[1200:]

    model = vilu.Selective(AnswerScores()).fit(fit).calibrate(calibration, max_risk=0.05)
    accepted = np.array(model.predict(new).decision) == "accept"
    wrong = new.failure == 1
    print(f"columns: {', '.join(table.numbers)}")
    print(f"of all answers {wrong.mean():.0%} are wrong")
    print(f"accepted are {accepted.mean():.0%}, of which {wrong[accepted].mean():.1%} are wrong")

    alone = {}
    for name in ("score_mean_logprob", "score_least_logprob", "score_agreement"):
        alone[name] = auroc(-new.numbers[name], new.failure)
        print(f"AUROC of {name} alone: {alone[name]:.3f}")
    combined = auroc(model.predict_uncertainty(new), new.failure)
    print(f"AUROC of their best combination: {combined:.3f}")

    assert wrong.mean() > 0.1
    assert accepted.mean() > 0.3
    assert wrong[accepted].mean() < 0.07
    assert combined > max(alone.values())


if __name__ == "__main__":
    main()
