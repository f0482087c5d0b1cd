"""The service's page in a real browser: a user chooses a photo and sees its answer, on a phone's
and a desktop's width.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.service.conftest import Running, hosted
from vilu.service.limits import read_keys

if TYPE_CHECKING:
    from playwright.sync_api import Browser, FileChooser


@pytest.mark.parametrize("width", [390, 1280])
def test_a_photo_is_answered(
    service: Running,
    browser: Browser,
    width: int,
    photos: Callable[[int], list[bytes]],
    tmp_path: Path,
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800})
    errors, asked, chosen = list[str](), list[str](), list["FileChooser"]()
    page.on("filechooser", lambda chooser: chosen.append(chooser))  # noqa: PLW0108 - no method of C for it
    page.on(
        "console", lambda message: errors.append(message.text) if message.type == "error" else None
    )
    page.on("request", lambda request: asked.append(request.url))
    page.goto(service.url)
    page.get_by_text("The guarantee holds").wait_for()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    (tmp_path / "a.png").write_bytes(photos(1)[0])
    page.keyboard.press("Space")  # the keyboard alone is enough
    while not chosen:
        page.wait_for_timeout(20)
    chosen[0].set_files(tmp_path / "a.png")
    page.locator("#answer").wait_for()
    assert page.locator("#decision").inner_text() in {"Accept", "Have a person look"}
    assert page.get_by_role("meter", name="Probability that the answer is wrong").count() == 1
    assert page.locator("#others tr").count() == 2
    (tmp_path / "b.png").write_bytes(b"none")
    page.locator("#file").set_input_files(tmp_path / "b.png")
    page.get_by_text("The picture cannot be read").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert errors == []
    assert all(url.startswith((service.url, "blob:")) for url in asked)
    page.close()


def test_the_page_asks_for_a_key_and_docs_come_from_here(
    predictors: tuple[Path, Path], tmp_path: Path, browser: Browser
) -> None:
    (tmp_path / "keys").write_text("0123456789abcdef")
    with hosted(predictors[0], tmp_path / "s", keys=read_keys(tmp_path / "keys")) as running:
        page = browser.new_page()
        page.goto(running.url)
        page.get_by_text("give a key").wait_for()
        page.get_by_label("Key of this service").fill("0123456789abcdef")
        page.keyboard.press("Tab")
        page.get_by_text("The guarantee holds").wait_for()
        page.close()
    with hosted(predictors[0], tmp_path / "t") as running:
        page, asked = browser.new_page(), list[str]()
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{running.url}/docs")
        page.get_by_text("/v1/answers").first.wait_for()
        assert all(url.startswith((running.url, "data:")) for url in asked)
        page.close()
