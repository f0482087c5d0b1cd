"""Test prompts as people read them: shown, and with a warning if two articles meet."""

from __future__ import annotations

import pytest

from vilu.backbones.zeroshot import TEMPLATES, describe_prompts, prompts_with_two_articles


@pytest.mark.parametrize(
    ("name", "template", "is_clumsy"),
    [
        ("a textile with a hole", "a photo of a {}.", True),
        ("The Beatles", "this is what a {} looks like.", True),
        ("textile with a hole", "a photo of a {}.", False),
        ("a textile", "a photo of {}.", False),
        ("a textile", "{}", False),
        ("antler", "a photo of a {}.", False),
        ("a", "it is an {}", True),
    ],
)
def test_two_articles_in_a_row_are_clumsy(name: str, template: str, is_clumsy: bool) -> None:
    prompts = prompts_with_two_articles([name, "coat"], [template])
    assert prompts == ([template.replace("{}", name)] if is_clumsy else [])


def test_prompts_are_shown_and_clumsy_ones_named() -> None:
    assert describe_prompts(["cat"], ("a photo of a {}.",)) == "Prompts: 'a photo of a {}.'."
    text = describe_prompts(["a cat", "a dog"], TEMPLATES["ensemble"])
    assert text.startswith("Prompts: 'a photo of a {}.', 'a picture showing a {}.', ")
    assert "and 4 more." in text
    # Both names clash in the six templates with an article before the name, and in "this {}".
    assert "'a photo of a a cat.' has two articles, and so do 13 more" in text
