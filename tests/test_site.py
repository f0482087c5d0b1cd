"""Test the site from `make docs` in a real browser, in phone and desk width, light and dark."""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image, ImageStat

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.site
SITE = Path(__file__).resolve().parents[1] / "build" / "site"
PAGES = [
    "",
    "concepts/",
    "start/",
    "howto/classifier/",
    "summary/",
    "formats/",
    "results/",
    "examples/",
    "examples/guarantee/",
    "commands/triage/",
    "python/begin/",
    "python/methods/",
]


class Quiet(SimpleHTTPRequestHandler):
    """A file server that does not write a line for each file to stderr."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as it is called there
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    assert (SITE / "index.html").exists(), "make docs"
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(
    params=[(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")],
    ids=lambda p: f"{p[0]}-{p[1]}",
)
def page(browser: Browser, address: str, request: pytest.FixtureRequest) -> Iterator[Page]:
    width, scheme = request.param
    opened = browser.new_page(
        viewport={"width": width, "height": 900}, color_scheme=scheme, base_url=address
    )
    trouble, asked = list[str](), list[str]()
    opened.on("console", lambda message: trouble.append(message.text))
    opened.on("pageerror", lambda error: trouble.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    yield opened
    opened.close()
    assert trouble == []
    assert [url for url in asked if not url.startswith((address, "data:", f"blob:{address}"))] == []


def brightness(page: Page, name: str) -> float:
    """Return the mean over a drawing's pixels as the page shows it, from 0 to 1."""
    shown = page.locator(f"img[src$='{name}']").screenshot()
    return ImageStat.Stat(Image.open(io.BytesIO(shown)).convert("L")).mean[0] / 255


@pytest.mark.parametrize("place", PAGES)
def test_nothing_is_wider_than_the_window(page: Page, place: str) -> None:
    page.goto(place)
    page.wait_for_load_state("networkidle")
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    wider = page.evaluate(
        """[...document.querySelectorAll('article > *, article img, article li, .card')]
           .filter((e) => !e.closest('.md-typeset__scrollwrap, pre'))
           .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5)
           .map((e) => e.outerHTML.slice(0, 80))"""
    )
    assert wider == []


@pytest.mark.parametrize(
    ("words", "title"),
    [
        ("coverage", "coverage"),
        ("pandas", "pandas"),
        ("cite", "cite"),
        ("conformal", "conformal"),
        ("FAQ", "FAQ"),
        ("predict_proba", "predict_proba"),
        ("exit code", "exit code"),
    ],
)
def test_search_finds(page: Page, words: str, title: str) -> None:
    page.goto("")
    if page.viewport_size["width"] < 960:
        page.locator("label[for=__search]").first.click()
    page.locator(".md-search__input").fill(words)
    first = page.locator(".md-search-result__item").first
    first.wait_for()
    assert title.lower() in first.text_content().lower()


def test_every_page_leads_to_the_next(page: Page) -> None:
    page.goto("")
    page.locator(".md-footer__link--next").click()
    page.wait_for_url("**/install/")
    page.locator(".md-footer__link--prev").wait_for()


def test_the_home_page_has_four_doors(page: Page) -> None:
    page.goto("")
    doors = page.locator(".grid.cards a")
    assert doors.count() == 4
    for number in range(4):
        assert doors.nth(number).bounding_box()["width"] > 0
    assert page.locator("img[src$='risk_coverage.svg']").is_visible()


def test_the_page_and_its_drawings_are_as_bright_as_the_system(page: Page) -> None:
    page.goto("concepts/")
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert page.evaluate("document.body.dataset.mdColorScheme") == ("slate" if dark else "default")
    for name in ("concepts-flow.svg", "concepts-threshold.svg"):
        assert (brightness(page, name) < 0.3) == dark


def test_the_reader_may_choose_dark(browser: Browser, address: str) -> None:
    page = browser.new_page(
        viewport={"width": 1280, "height": 900}, color_scheme="light", base_url=address
    )
    page.goto("concepts/")
    for name in ("Light", "Dark"):
        page.locator(f"label[title={name}]:visible").click()
    assert page.evaluate("document.body.dataset.mdColorScheme") == "slate"
    assert brightness(page, "concepts-flow.svg") < 0.3
    page.close()
