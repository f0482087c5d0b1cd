"""Test that completions with log-probabilities become a table of answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vilu.errors import DataError, StorageError
from vilu.tables.sources import completion_answers

Json = dict[str, Any]


def chat(text: str | None, *logprobs: float, finish: str = "stop") -> Json:
    """Return a choice in a chat completion, as vLLM writes it."""
    tokens = [{"token": "t", "logprob": number, "top_logprobs": []} for number in logprobs]
    message = {"role": "assistant", "content": text}
    return {"message": message, "logprobs": {"content": tokens}, "finish_reason": finish}


def plain(text: str, *logprobs: float | None) -> Json:
    """Return a choice in a plain completion."""
    return {"text": text, "logprobs": {"tokens": [], "token_logprobs": list(logprobs)}}


def response(*choices: Json, row_id: str = "a") -> Json:
    return {"id": row_id, "object": "chat.completion", "choices": list(choices)}


def written(folder: Path, *records: Json | str) -> Path:
    lines = [one if isinstance(one, str) else json.dumps(one) for one in records]
    path = folder / "run.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_mean_least_and_first_of_a_chat(tmp_path: Path) -> None:
    path = written(tmp_path, response(chat("a cat", -0.25, -1.5, -0.5)))
    assert completion_answers(path).columns == {
        "id": ["a"],
        "answer": ["a cat"],
        "correct": [None],
        "score_mean_logprob": [-0.75],
        "score_least_logprob": [-1.5],
        "score_first_logprob": [-0.25],
        "n_tokens": [3],
        "cut_off": [0],
    }


def test_plain_completions_give_the_same_numbers(tmp_path: Path) -> None:
    as_chat = completion_answers(written(tmp_path, response(chat("cat", -0.25, -1.5))))
    as_plain = completion_answers(written(tmp_path, response(plain("cat", -0.25, -1.5))))
    assert as_plain == as_chat


def test_a_batch_has_its_own_ids(tmp_path: Path) -> None:
    body = response(chat("cat", -0.5), row_id="of the server")
    line = {"custom_id": "mine", "response": {"status_code": 200, "body": body}, "error": None}
    assert completion_answers(written(tmp_path, line)).columns["id"] == ["mine"]


def test_lines_without_an_id_have_their_number(tmp_path: Path) -> None:
    record = {"choices": [chat("cat", -0.5)]}
    path = written(tmp_path, record, "", record)
    assert completion_answers(path).columns["id"] == ["1", "3"]


def test_agreement_is_the_share_of_the_majority(tmp_path: Path) -> None:
    samples = [chat("dog", -0.1), chat("Cat ", -0.5), chat("cat", -0.25), chat("cow", -0.01)]
    path = written(tmp_path, response(*samples), response(chat("owl", -1.0), row_id="b"))
    columns = completion_answers(path).columns
    assert columns["answer"] == ["cat", "owl"]
    assert columns["score_agreement"] == [0.5, 1.0]
    assert columns["score_mean_logprob"] == [-0.25, -1.0]  # from the best sample with this answer


def test_equal_votes_go_to_the_surest_sample(tmp_path: Path) -> None:
    path = written(tmp_path, response(chat("dog", -0.5), chat("cat", -0.25)))
    columns = completion_answers(path).columns
    assert (columns["answer"], columns["score_agreement"]) == (["cat"], [0.5])


def test_an_answer_at_the_largest_length_is_cut_off(tmp_path: Path) -> None:
    path = written(tmp_path, response(chat("a cat that", -0.5, finish="length")))
    assert completion_answers(path).columns["cut_off"] == [1]


def test_truth_is_compared_without_case_and_space(tmp_path: Path) -> None:
    records = [response(chat("A  Cat", -0.5), row_id=name) for name in ("a", "b", "c")]
    truth = {"a": " a cat", "b": "dog"}
    converted = completion_answers(written(tmp_path, *records), truth)
    assert converted.columns["correct"] == [1, 0, None]
    assert converted.n_known == 2


def test_truth_of_other_ids_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, response(chat("cat", -0.5)))
    with pytest.raises(DataError, match=r"none of the 1 truth has the id.*'a'.*'b'"):
        completion_answers(path, {"b": "cat"})


GOOD = json.dumps(response(chat("cat", -0.5), row_id="first"))
REFUSED = {
    "cut off": (GOOD[:-20], "cut off or damaged"),
    "no object": ("[1, 2]", "holds no object"),
    "NaN": (GOOD.replace("-0.5", "NaN"), "no finite number"),
    "too large": (GOOD.replace("-0.5", "-1e999"), "no finite number"),
    "deep": ("[" * 100_000, "cut off or damaged"),
    "key twice": ('{"id": "a", "id": "b"}', "a key occurs twice"),
    "half a character": ('{"id": "\\ud800"}', "cut off or damaged"),
    "no choices": ('{"id": "a"}', "choices: Field required"),
    "empty choices": ('{"id": "a", "choices": []}', "at least 1 item"),
    "choices no list": ('{"id": "a", "choices": {"0": 1}}', "valid list"),
    "positive": (GOOD.replace("-0.5", "0.5"), "less than or equal to 0"),
    "text as number": (GOOD.replace("-0.5", '"-0.5"'), "valid number"),
    "no logprobs": (json.dumps(response({"text": "cat"})), "Ask with logprobs"),
    "null logprobs": (json.dumps(response({"text": "cat", "logprobs": None})), "Ask with logprobs"),
    "no tokens": (json.dumps(response(chat("cat"))), "at least one token"),
    "echo": (json.dumps(response(plain("a cat", None, -0.5))), "without echo"),
    "tool call": (json.dumps(response(chat(None, -0.5))), "Calls of tools"),
    "stream": ('{"id": "a", "choices": [{"delta": {"content": "c"}}]}', "parts of a stream"),
    "failed": ('{"custom_id": "q", "response": null, "error": {"code": 500}}', "'q' failed"),
    "server error": (
        '{"custom_id": "q", "response": {"status_code": 500, "body": {"message": "full"}}}',
        "choices: Field required",
    ),
    "id twice": (GOOD, "'first' is on line 1"),
}


@pytest.mark.parametrize(("line", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_lines_are_refused_by_their_number(tmp_path: Path, line: str, reason: str) -> None:
    path = written(tmp_path, GOOD, "", line)
    with pytest.raises(DataError, match=r"run\.jsonl line 3") as refusal:
        completion_answers(path)
    assert reason in str(refusal.value)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"\x80\x00\xff")
    with pytest.raises(DataError, match="line 1"):
        completion_answers(path)


def test_an_endless_line_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vilu.tables.sources.completions.MAX_LINE_BYTES", 1_000)
    with pytest.raises(DataError, match="line 1 has more than 1,000 bytes"):
        completion_answers(written(tmp_path, "[" * 1_001))


def test_an_empty_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="It has none"):
        completion_answers(written(tmp_path, ""))
    with pytest.raises(StorageError, match=r"none\.jsonl"):
        completion_answers(tmp_path / "none.jsonl")
