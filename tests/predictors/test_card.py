"""Test model cards.

Their facts must match the data that a predictor was fitted on. Names with markup must be shown as
text.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import yaml

from tests.conftest import toy_embeddings, variant
from vilu.artifacts.documents import write_json
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError
from vilu.predictors.persistence import description, storage
from vilu.predictors.persistence.card import GUARANTEE_FACTS, code_span, hub_id, model_card
from vilu.predictors.vilu.vilu import LVU
from vilu.predictors.zero_shot import MCM
from vilu_bench.methods.neighbours import KNNVote

EVIL = 'x`` ---\n# owned\n<script>alert(1)</script> | `` \x1b[31m {{ "a": *b }} 🦊'


def parts(card: str) -> tuple[dict[str, object], str]:
    """Return a card's YAML header and its body."""
    empty, header, body = card.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(header), body


def test_facts_are_those_of_the_fit(tmp_path: Path) -> None:
    data = toy_embeddings(200)
    space = EmbeddingSpace(
        16, 20.0, 0.5, "hf:openai/clip-vit-base-patch32", "ab" * 32, "224 px", "BPE", "bf16"
    )
    predictor = LVU(epochs=1, hidden=(4,), seed=7).fit(variant(data, space=space))
    fingerprint = predictor.save(tmp_path)
    header, body = parts((tmp_path / "README.md").read_text())
    assert header["library_name"] == "vilu"
    assert header["base_model"] == "openai/clip-vit-base-patch32"
    assert {"failure-prediction", "lvu"} <= set(header["tags"])
    wrong = int(((data.image @ data.text.T).argmax(dim=1) != data.target).sum())
    assert 0 < wrong < 200
    for fact in (
        "training rows: `200`",
        f"failures among them: `{wrong}`",
        f"these rows: {wrong / 200:.2%}",
    ):
        assert fact in body
    for fact in (
        "seed: `7`",
        "`hidden`: `[4]`",
        "logit scale: `20.0`",
        "logit bias: `0.5`",
        f"`{'ab' * 32}`",
        "BPE",
    ):
        assert fact in body
    assert "Corbière et al., NeurIPS 2019" in body
    assert "--precision bf16" in body
    assert fingerprint in body
    assert storage.load_predictor(tmp_path).name == "lvu"


def test_names_stay_names(tmp_path: Path) -> None:
    space = EmbeddingSpace(16, 20.0, backbone=EVIL, weights="w", tokenizer="```\n" * 3)
    MCM().fit(variant(toy_embeddings(20), space=space)).save(tmp_path)
    header, body = parts((tmp_path / "README.md").read_text(encoding="utf-8"))
    assert "base_model" not in header
    assert not re.search(r"^\s*# owned", body, re.MULTILINE)
    assert "\x1b" not in body
    outside = re.sub(
        r"(`+)(?!`).*?(?<!`)\1(?!`)", "", re.sub(r"^```bash\n.*?^```$", "", body, flags=re.M | re.S)
    )
    assert "script" in body
    assert "script" not in outside


@pytest.mark.parametrize("text", ["plain", "`", "a``b`", "``", " ", "", "`a", "a\nb", "<b>|*_"])
def test_a_code_span_shows_its_text(text: str) -> None:
    """A code span must show its text.

    In CommonMark 6.1 a span ends at a run with as many backticks as its start. One space goes at
    both ends, unless all characters are spaces.
    """
    span = code_span(text)
    fence = re.match("`+", span).group()
    inside = span[len(fence) : -len(fence)]
    assert fence not in re.findall("`+", inside)
    assert span.endswith(fence)
    if inside.startswith(" ") and inside.endswith(" ") and inside.strip():
        inside = inside[1:-1]
    assert inside == (text.replace("\n", "\\n") or " ") or (not text.strip() and not inside.strip())


@pytest.mark.parametrize(
    ("backbone", "found"),
    [
        ("hf:google/siglip-base-patch16-224", "google/siglip-base-patch16-224"),
        ("open_clip:hf-hub:timm/ViT-B-16-SigLIP", "timm/ViT-B-16-SigLIP"),
        ("clip-vit-b32", "timm/vit_base_patch32_clip_224.openai"),
        ("clip-vit-b32@hf", "openai/clip-vit-base-patch32"),
        ("open_clip:ViT-B-32/openai", "timm/vit_base_patch32_clip_224.openai"),
        ("open_clip:ViT-B-32/somebody", None),
        ("hf:/home/me/model", None),
        ("hf:a/b\nlicense: mit", None),
        ("compact", None),
        (None, None),
    ],
)
def test_backbones_that_the_hub_has(backbone: str | None, found: str | None) -> None:
    assert hub_id(backbone) == found


def test_a_guarantee_is_told_once_it_is_there_and_not_of_another_fit(tmp_path: Path) -> None:
    data = toy_embeddings(60)
    MCM().fit(data).save(tmp_path)
    assert "none: `vilu calibrate` was not run" in (tmp_path / "README.md").read_text()
    risk = {
        "kind": "risk",
        "guarantee": "at most 5 % are wrong",
        "n": 60,
        "dataset": "shots`",
        "rule": {"a": 1},
    }
    write_json(tmp_path / "risk.json", risk)
    storage.write_card(tmp_path)
    card = (tmp_path / "README.md").read_text()
    for key in risk.keys() & GUARANTEE_FACTS.keys():
        assert f"{GUARANTEE_FACTS[key]}: {code_span(risk[key])}" in card
    assert '"a"' not in card
    KNNVote().fit(data).save(tmp_path)  # risk.json belongs to the first fit
    card = (tmp_path / "README.md").read_text()
    assert "at most 5" not in card
    assert "classes that it was fitted on and no others" in card
    (tmp_path / "risk.json").write_text("[1]")
    with pytest.raises(DataError, match="holds no object, but list"):
        storage.write_card(tmp_path)


def test_the_description_is_still_written_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(description, "write_json", crash)
    with pytest.raises(KeyboardInterrupt):
        MCM().fit(toy_embeddings(20)).save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"weights.safetensors", "README.md"}
    with pytest.raises(DataError, match="no predictor here"):
        storage.load_predictor(tmp_path)


def test_pools_and_a_missing_space() -> None:
    method = SimpleNamespace(
        answer="zero_shot",
        summary="s",
        reference="r",
        is_probability=False,
        closed_set=False,
        needs_fit=True,
        takes="embeddings",
        columns_to_score=("features",),
    )
    record = {
        "vilu": "0",
        "method": "m",
        "parameters": {},
        "space": None,
        "notes": {"pool_size": 256},
    }
    card = model_card(record, method)
    assert "chose from): `256`" in card
    assert "--pool-size 256" in card
    assert "--features" in card
    assert "it is no probability" in card
    assert "bare arrays" in card
    space = dataclasses.asdict(EmbeddingSpace(4, 1.0, backbone="a b; rm -rf ~"))
    assert "--backbone 'a b; rm -rf ~' --features\n" in model_card(
        {**record, "space": space}, method
    )


@pytest.mark.parametrize(
    ("answer", "noun"),
    [("zero_shot", "the zero-shot answer is wrong"), ("given", "given with the image is wrong")],
)
def test_the_judged_answer_is_named(
    answer: Literal["zero_shot", "given"], noun: str, tmp_path: Path
) -> None:
    MCM(answer=answer).save(tmp_path)
    _, body = parts((tmp_path / "README.md").read_text())
    assert noun in body
