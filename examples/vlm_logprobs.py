"""A language model answers questions about my pictures, with logprobs: which answers can I trust?

Reads completions in OpenAI's format, as vLLM writes them, and makes a table of the answers. The
table has the mean, the least and the first log-probability of the tokens, and the agreement of
three samples. The completions are simulated: the model knows an answer, or it guesses. Put your own
file in their place.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import vilu
from vilu.metrics.ranking import auroc
from vilu.tables.methods import AnswerScores
from vilu.tables.sources import completion_answers

ANSWERS = ("a red car", "two dogs", "a bridge", "an old man", "snow", "a bus stop")
N_QUESTIONS = 1_800
N_SAMPLES = 3


def simulated_sample(answer: str, doubt: float, random: np.random.Generator) -> dict[str, Any]:
    """Simulate one sample, with the log-probability of each token."""
    tokens = []
    for word in answer.split():
        logprob = -doubt * random.exponential()
        tokens.append({"token": word, "logprob": logprob})
    return {"message": {"content": answer}, "logprobs": {"content": tokens}}


def write_completions(path: Path) -> dict[str, str]:
    """Write a line for each question, and return the right answers by question id."""
    random = np.random.default_rng(seed=3)
    right_answers = {}
    lines = []
    for number in range(N_QUESTIONS):
        question_id = f"question {number}"
        right_answer = str(random.choice(ANSWERS))
        knowledge = random.beta(2, 1)  # This is the probability that a sample is not guessed.
        samples = []
        for _ in range(N_SAMPLES):
            is_known = random.random() < knowledge
            answer = right_answer if is_known else str(random.choice(ANSWERS))
            doubt = np.exp(-3 * knowledge) + 0.05 * random.random()
            samples.append(simulated_sample(answer, doubt, random))
        lines.append(json.dumps({"id": question_id, "choices": samples}))
        right_answers[question_id] = right_answer
    path.write_text("\n".join(lines), encoding="utf-8")
    return right_answers


def main() -> None:
    """Read completions, and decide about the answers."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.jsonl"
        right_answers = write_completions(path)
        answers = completion_answers(path, truth=right_answers)
    # answers.write("answers.csv") would keep the table.
    table = vilu.open_table(answers.columns)
    new = table[1200:]

    model = vilu.Selective(AnswerScores())
    model.fit(table[:600])
    model.calibrate(table[600:1200], max_risk=0.05)
    outcomes = model.predict(new)

    accepted = np.array(outcomes.decision) == "accept"
    wrong = new.failure == 1
    print(f"the table has these columns of numbers: {', '.join(table.numbers)}")
    print(f"{wrong.mean():.0%} of all answers are wrong")
    print(
        f"{accepted.mean():.0%} of the answers are accepted, "
        f"and {wrong[accepted].mean():.1%} of the accepted answers are wrong"
    )

    auroc_alone = {}
    for name in ("score_mean_logprob", "score_least_logprob", "score_agreement"):
        auroc_alone[name] = auroc(-new.numbers[name], new.failure)
        print(f"AUROC of {name} alone: {auroc_alone[name]:.3f}")
    auroc_combined = auroc(outcomes.uncertainty, new.failure)
    print(f"AUROC of the best combination: {auroc_combined:.3f}")

    assert wrong.mean() > 0.1
    assert accepted.mean() > 0.3
    assert wrong[accepted].mean() < 0.07
    assert auroc_combined > max(auroc_alone.values())


if __name__ == "__main__":
    main()
