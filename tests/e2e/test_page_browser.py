"""``vilu report`` through the command line: its page in headless Chromium shows the numbers that
numpy computes.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.builders.page_data import outcomes_of, write_pictures
from tests.command import run
from vilu.outcomes.outcomes import Outcomes

N = 700  # more distinct scores than the slider has points


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    (folder / "scores").mkdir()
    one = outcomes_of(N)
    fine = one.uncertainty + np.random.default_rng(3).uniform(0, 1e-4, N)  # the scores differ
    Outcomes(
        np.clip(fine, 0, 1),
        one.failure,
        one.prediction,
        one.target,
        one.ids,
        one.class_names,
        "vilu_plus",
    ).save(folder / "scores" / "plus.parquet")
    outcomes_of(N, seed=1, method="mcm", noise=0.5).save(folder / "scores" / "mcm.parquet")
    write_pictures(folder / "images.parquet", N)
    done = run(
        "report",
        folder / "scores",
        "-o",
        folder / "report.html",
        "--images",
        folder / "images.parquet",
    )
    assert done.stdout.strip() == str(folder / "report.html")
    return folder


def test_errors_say_what_and_how(work: Path) -> None:
    outcomes_of(100, method="other").save(work / "few.parquet")
    (work / "mixed").mkdir()
    for path in (work / "few.parquet", work / "scores" / "mcm.parquet"):
        shutil.copy(path, work / "mixed")
    for args, code, message in (
        ([work / "scores", "-o", work / "x.pdf"], 2, ".html"),
        (
            [work / "mixed", "-o", work / "x.html"],
            6,
            "other on toy and mcm on toy must be of the same rows",
        ),
        ([work / "scores", "-o", work / "x.html", "--predictor", work], 3, "is not calibrated"),
    ):
        done = run("report", *args, code=code)
        assert message in done.stderr
        assert done.stdout == ""
    assert not (work / "x.html").exists()


class Visit:
    """Open the page in a window with a given width, and record its requests and errors."""

    def __init__(self, browser, page: Path, width: int, **options: object) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": 800}, **options)
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(page.as_uri())

    def close(self) -> None:
        """Check that the page requested only itself and embedded pictures, and that no error
        occurred.
        """
        outside = [url for url in self.requests if not url.startswith("data:image/webp;base64,")]
        assert len(outside) == 1
        assert outside[0].startswith("file:")
        assert self.complaints == []
        self.page.close()

    def number(self, key: str) -> int:
        return int(re.match(r"[\d,]+", self.page.text_content(f"#{key}"))[0].replace(",", ""))

    def share(self, key: str) -> float:
        return float(self.page.text_content(f"#{key}").removesuffix(" %")) / 100


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(browser, work: Path, width: int) -> None:
    visit = Visit(browser, work / "report.html", width)
    assert visit.page.evaluate("document.documentElement.scrollWidth") == width
    clipped = visit.page.evaluate(
        """[...document.querySelectorAll('h1,h2,h3,p,dd,figure,.card,form,button')]
           .filter((e) => !e.closest('.scroll'))
           .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5).length"""
    )
    assert clipped == 0
    visit.close()


def test_the_threshold_moves_numbers_curves_and_pictures(browser, work: Path) -> None:
    one = Outcomes.load(work / "scores" / "plus.parquet")
    visit = Visit(browser, work / "report.html", 1280)
    page = visit.page
    data = json.loads(page.text_content("#data"))
    assert len(data["threshold"]) <= 500
    chosen = float(page.input_value("#threshold"))
    assert chosen == max(
        t for t in one.uncertainty if one.failure[one.uncertainty <= t].mean() <= 0.05
    )
    before = {
        card: float(card.get_attribute("data-u")) <= chosen
        for card in page.query_selector_all(".card")
    }
    assert len(before) == 72

    def check() -> float:
        threshold = float(page.input_value("#threshold"))
        accepted = one.uncertainty <= threshold
        assert visit.number("accepted") == accepted.sum()
        assert visit.number("wrong") == one.failure[accepted].sum()
        assert visit.number("review") == N - accepted.sum()
        assert visit.share("coverage") == pytest.approx(accepted.mean(), abs=0.00051)
        assert visit.share("risk") == pytest.approx(one.failure[accepted].mean(), abs=0.00051)
        circle = page.query_selector('svg[data-chart="roc"] .marker circle')
        tpr, fpr = accepted[one.failure == 0].mean(), accepted[one.failure == 1].mean()
        assert float(circle.get_attribute("cx")) == pytest.approx(46 + 342 * fpr, abs=0.01)
        assert float(circle.get_attribute("cy")) == pytest.approx(250 - 220 * tpr, abs=0.01)
        flipped = 0
        for card, was in before.items():
            now = float(card.get_attribute("data-u")) <= threshold
            assert ("flipped" in card.get_attribute("class")) == (now != was)
            assert card.query_selector(".state").text_content().split()[-1] == (
                "accepted" if now else "review"
            )
            flipped += now != was
        assert visit.number("flips") == flipped
        return threshold

    assert check() == chosen
    page.fill("#threshold", "0.6")
    page.press("#threshold", "Enter")
    assert check() == max(t for t in data["threshold"][1:] if t <= 0.6)
    assert visit.number("flips") > 0
    page.focus("#slider")
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    assert check() > 0.6
    assert "accepted" in page.get_attribute("#slider", "aria-valuetext")
    page.click("#reset")
    assert check() == chosen
    page.fill("#threshold", "-1")
    page.press("#threshold", "Enter")
    assert (visit.number("accepted"), visit.number("review")) == (0, N)
    assert page.text_content("#risk") == "–"
    visit.close()


def test_a_pointer_reads_the_curve_and_a_heading_sorts(browser, work: Path) -> None:
    one = Outcomes.load(work / "scores" / "plus.parquet")
    visit = Visit(browser, work / "report.html", 1280)
    svg = visit.page.query_selector('svg[data-chart="risk"]')
    svg.scroll_into_view_if_needed()
    box = svg.bounding_box()
    order = np.argsort(one.uncertainty)
    half = one.failure[order][: N // 2].mean()
    # The point on the curve at half coverage. The box is 400 x 300 units, and the axis ends at a
    # round number.
    top = float(svg.get_attribute("data-y").split()[1])
    x, y = 46 + 342 / 2, 250 - 220 * half / top
    visit.page.mouse.move(box["x"] + box["width"] * x / 400, box["y"] + box["height"] * y / 300)
    told = visit.page.text_content("figure:has(svg[data-chart=risk]) .readout")
    name, coverage, errors = re.fullmatch(
        r"(\S+): coverage ([\d.]+) %, errors ([\d.]+) %", told
    ).groups()
    assert name == "vilu_plus"
    kept = round(float(coverage) / 100 * N)
    assert float(coverage) == pytest.approx(50, abs=1)  # a line has at most 250 points
    risks = [100 * one.failure[order][:m].mean() for m in (kept - 1, kept, kept + 1)]
    assert min(risks) - 0.1 <= float(errors) <= max(risks) + 0.1

    heading = visit.page.locator(".sortable thead button").nth(3)
    cells = ".sortable tbody tr td:nth-child(4)"
    for sign in (-1, 1):
        heading.click()
        values = [
            float(v)
            for v in visit.page.eval_on_selector_all(cells, "all => all.map((e) => e.dataset.v)")
        ]
        assert values == sorted(values, reverse=sign < 0)
    visit.close()


def test_without_scripts_everything_but_the_slider_is_there(browser, work: Path) -> None:
    visit = Visit(browser, work / "report.html", 1280, java_script_enabled=False)
    assert not visit.page.is_visible("#control")
    for selector in (
        "svg[data-chart=risk] .marker circle",
        "svg[data-chart=roc]",
        ".figures",
        ".sortable",
        ".card img",
    ):
        assert visit.page.locator(selector).first.is_visible()
    visit.close()
