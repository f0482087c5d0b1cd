"""Language models' answers, from completions in OpenAI's format with log-probabilities.

vLLM and other servers write this format. A line of a file holds a completion, or the result of a
batch request: a ``custom_id`` and a completion. A completion is a chat completion or a plain
completion. All of these are read.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vilu.artifacts.disk import convert_os_errors
from vilu.artifacts.documents import first_error, parse_json
from vilu.errors import DataError
from vilu.tables.sources.converted import Columns, Converted, comparable_text, correct_cells

MAX_LINE_BYTES = 64 * 2**20
"""Longer lines are refused. 30,000 tokens with 20 alternatives each need fewer bytes."""

N_SAMPLES: Final = "n_samples"
NUMBER_COLUMNS = (
    "score_mean_logprob",
    "score_least_logprob",
    "score_first_logprob",
    "score_agreement",
    "n_tokens",
    N_SAMPLES,
    "cut_off",
)
"""Names of the number columns."""

Row = dict[str, float | str]
"""The cells in a row: "answer", and the numbers of ``NUMBER_COLUMNS``."""

LogProbability = Annotated[float, Field(le=0)]


class CompletionPart(BaseModel):
    """A part of a completion. Types are strict, and unneeded fields are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class Token(CompletionPart):
    """A token in a chat completion."""

    logprob: LogProbability


class LogProbabilities(CompletionPart):
    """Log-probabilities for an answer's tokens."""

    content: list[Token] | None = None  # in a chat completion
    token_logprobs: list[LogProbability | None] | None = None  # in a plain completion


class Message(CompletionPart):
    """The answer in a chat."""

    content: str | None = None


class CompletionChoice(CompletionPart):
    """A sample in a completion. A completion may have several samples."""

    message: Message | None = None
    text: str | None = None
    logprobs: LogProbabilities | None = None
    finish_reason: str | None = None


class Completion(CompletionPart):
    """The samples for a request."""

    id: str | None = None
    choices: Annotated[list[CompletionChoice], Field(min_length=1)]


class BatchLine(CompletionPart):
    """A line in a batch: a request, and a response or an error."""

    custom_id: str
    response: dict[str, Any] | None = None
    error: Any = None


@dataclass(frozen=True)
class CompletionSample:
    """An answer with its token log-probabilities."""

    answer: str
    logprobs: list[float]
    is_cut_off: bool  # whether the answer ended at the token limit

    def mean(self) -> float:
        """Compute the mean log-probability of the tokens."""
        return sum(self.logprobs) / len(self.logprobs)


def completion_answers(
    path: str | os.PathLike[str], truth: Mapping[str, str] | None = None
) -> Converted:
    """Read a JSONL file of completions with ``logprobs`` as an answer table.

    A line holds a response, or a batch line (``custom_id``, ``response``). The answer is the
    most frequent text among the n samples. Texts are equal if they differ only in case and white
    space. If several texts are equally frequent, the best sample's text is taken. The best
    sample has the largest mean log-probability. The numbers describe the best sample with the
    answer:

    - ``score_mean_logprob``, ``score_least_logprob``, ``score_first_logprob``: mean, least and
      first log-probability of the tokens.
    - ``score_agreement``: share of samples with the answer, only if lines have several samples.
    - ``n_tokens``: token count.
    - ``cut_off``: 1 if the answer ended at the token limit, else 0.

    Args:
        path: The file, with one completion per line. Empty lines are skipped.
        truth: Row id -> right answer. In rows without an entry, the column ``correct`` is empty.
            The id of a line is ``custom_id``, else ``id``, else the line number.

    Raises:
        DataError: If a line is no whole completion with log-probabilities, if an id occurs twice,
            or if ``truth`` contains none of the ids. The message names the line.
        StorageError: If the file cannot be read.

    Examples:
        >>> import json, pathlib, tempfile
        >>> from vilu.tables.sources import completion_answers
        >>> tokens = [{"token": "c", "logprob": -0.5}, {"token": "at", "logprob": -0.1}]
        >>> choice = {"message": {"content": "cat"}, "logprobs": {"content": tokens}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder) / "run.jsonl"
        ...     _ = file.write_text(json.dumps({"id": "a", "choices": [choice]}))
        ...     columns = completion_answers(file, {"a": "Cat"}).columns
        >>> columns["answer"], columns["correct"], columns["score_mean_logprob"]
        (['cat'], [1], [-0.3])
    """
    rows = _read_rows(Path(path))
    columns = _table_columns(rows, truth)
    return Converted(columns)


def _table_columns(rows: Mapping[str, Row], truth: Mapping[str, str] | None) -> Columns:
    """Make the table's columns. ``rows`` maps row ids to cells."""
    ids = list(rows)
    answers = [str(row["answer"]) for row in rows.values()]
    columns: Columns = {"id": ids, "answer": answers, "correct": correct_cells(ids, answers, truth)}
    for name in NUMBER_COLUMNS:
        columns[name] = [row[name] for row in rows.values()]
    if set(columns[N_SAMPLES]) == {1}:
        del columns["score_agreement"]  # a single sample agrees with itself
    del columns[N_SAMPLES]
    return columns


def _read_rows(path: Path) -> dict[str, Row]:
    """Return row id -> cells."""
    rows: dict[str, Row] = {}
    line_of_id: dict[str, int] = {}
    for number, content in _lines(path):
        location = f"{path} line {number}"
        row_id, completion = _parse_line(content, number, location)
        if row_id in line_of_id:
            raise DataError(
                f"{location}: every id must occur once. {row_id!r} is on line "
                f"{line_of_id[row_id]}, too. Put all samples of a request into the choices of "
                "one line (n=...)."
            )
        line_of_id[row_id] = number
        samples = [_parse_sample(choice, location) for choice in completion.choices]
        rows[row_id] = _row_of_samples(samples)
    if not rows:
        raise DataError(f"{path} must have one completion per line. It has none.")
    return rows


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the nonempty lines in a file, with line numbers from 1."""
    with convert_os_errors(f"cannot read {path}"), path.open("rb") as file:
        for number, line in enumerate(_bounded_lines(file, path), start=1):
            if line.strip():
                yield number, line


def _bounded_lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Yield lines. Raises DataError at a line too long for a completion."""
    number = 1
    line = file.readline(MAX_LINE_BYTES + 1)
    while line:
        if len(line) > MAX_LINE_BYTES:
            raise DataError(
                f"{path} line {number} has more than {MAX_LINE_BYTES:,} bytes. A line must hold "
                "one completion."
            )
        yield line
        number += 1
        line = file.readline(MAX_LINE_BYTES + 1)


def _parse_line(content: bytes, number: int, location: str) -> tuple[str, Completion]:
    """Parse the id and the completion on a line. Without an id, ``number`` is the id."""
    try:
        record = parse_json(content)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{location} must hold a whole JSON object. The line is cut off or damaged: {error}. "
            "Write it again, or remove it."
        ) from error
    batch_id = None
    try:
        if "custom_id" in record:
            request = BatchLine.model_validate(record)
            batch_id = request.custom_id
            record = _completion_of_batch(request, location)
        completion = Completion.model_validate(record)
    except ValidationError as error:
        problem = first_error(error)
        raise DataError(
            f"{location} must hold a completion in OpenAI's format with logprobs: {problem}."
        ) from error
    return batch_id or completion.id or str(number), completion


def _completion_of_batch(request: BatchLine, location: str) -> dict[str, Any]:
    """Return the completion in a batch line. Raises DataError if the request failed."""
    body = (request.response or {}).get("body")
    if request.error is None and isinstance(body, dict):
        return body
    reason = request.error or request.response or "it has no response"
    raise DataError(
        f"{location}: the request {request.custom_id!r:.80} failed: {reason!s:.200}. Ask it again, "
        "or remove the line."
    )


def _parse_sample(choice: CompletionChoice, location: str) -> CompletionSample:
    """Parse a choice's answer. Raises DataError without an answer or without log-probabilities."""
    answer = choice.text
    if choice.message is not None:
        answer = choice.message.content
    if answer is None:
        raise DataError(
            f"{location} must have choices with a text, or with a message that has content. Calls "
            "of tools, refusals and parts of a stream have none; remove the line."
        )
    logprobs = _token_logprobs(choice, location)
    is_cut_off = choice.finish_reason == "length"
    return CompletionSample(answer.strip(), logprobs, is_cut_off)


def _token_logprobs(choice: CompletionChoice, location: str) -> list[float]:
    """Return the log-probabilities of all tokens in a choice."""
    logprobs_field = choice.logprobs or LogProbabilities()
    if logprobs_field.content is not None:
        logprobs = [token.logprob for token in logprobs_field.content]
    elif logprobs_field.token_logprobs is not None:
        if None in logprobs_field.token_logprobs:
            raise DataError(
                f"{location} has a token without a log-probability, as the first token of a "
                "prompt. Ask without echo, so that only the answer has log-probabilities."
            )
        # there is no None here, but a type checker does not know this
        logprobs = [logprob for logprob in logprobs_field.token_logprobs if logprob is not None]
    else:
        raise DataError(
            f"{location} must have log-probabilities. Ask with logprobs: true for a chat, and with "
            "logprobs: 1 for a plain completion."
        )
    if not logprobs:
        raise DataError(f"{location} must have at least one token. Remove the line.")
    return logprobs


def _row_of_samples(samples: list[CompletionSample]) -> Row:
    """Combine a request's samples into one row.

    The row has the most frequent answer, and the numbers of the best sample with this answer.
    """
    comparable_texts = [comparable_text(sample.answer) for sample in samples]
    votes = Counter(comparable_texts)
    most_votes = max(votes.values())
    # samples with a most frequent answer: several answers may be equally frequent
    samples_with_most_votes = [
        sample for sample in samples if votes[comparable_text(sample.answer)] == most_votes
    ]
    best_sample = max(samples_with_most_votes, key=CompletionSample.mean)
    return {
        "answer": best_sample.answer,
        "score_mean_logprob": best_sample.mean(),
        "score_least_logprob": min(best_sample.logprobs),
        "score_first_logprob": best_sample.logprobs[0],
        "score_agreement": most_votes / len(samples),
        N_SAMPLES: len(samples),
        "n_tokens": len(best_sample.logprobs),
        "cut_off": int(best_sample.is_cut_off),
    }
