"""Reports in a real browser: every figure is drawn, nothing is loaded, and no text is cut off."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from lightning_bge.advisor.report.report import write_report
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.progress import Progress
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.scheduling.study_queue import StudyQueue
from lightning_bge.hpo.scheduling.trial_loop import run_trials
from lightning_bge.hpo.space.draw import SamplerConfig
from lightning_bge.hpo.space.search_space import parse_space
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.storage.workers import Worker
from lightning_bge.hpo.study import open_study, study_storage
from lightning_bge.runtime.run_folder import write_json
from lightning_bge.runtime.stop import StopRequest
from tests.helpers.audit_sample import AUDIT
from tests.helpers.made_study import make_study
from tests.helpers.small_search import SPACE, make, write_files

optuna.logging.set_verbosity(optuna.logging.WARNING)

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not there: apt-get install chromium"),
]

FORMS: dict[str, dict[str, Any]] = {
    "light": {"viewport": {"width": 1200, "height": 900}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1200, "height": 900}, "color_scheme": "dark"},
    "phone": {
        "viewport": {"width": 390, "height": 844},
        "is_mobile": True,
        "has_touch": True,
        "device_scale_factor": 2,
    },
}

# of each figure: whether it is drawn, and how many marks it has
DRAWN = """() => Object.fromEntries([...document.querySelectorAll(".plot")].map((box) => [box.id, {
    drawn: box.classList.contains("js-plotly-plot") && box.querySelectorAll("svg.main-svg").length > 0,
    marks: box.querySelectorAll(".point, .js-line, .js-fill").length,
}]))"""

# texts that reach out of their figure, and ticks of an axis that lie on each other
UNREADABLE = """() => [...document.querySelectorAll(".plot")].flatMap((box) => {
    const frame = box.getBoundingClientRect(), found = [];
    const rect = (text) => text.getBoundingClientRect();
    for (const text of box.querySelectorAll("svg.main-svg text")) {
        const { left, right, top, bottom, width } = rect(text);
        const inside = left > frame.left - 1 && right < frame.right + 1 
            && top > frame.top - 1 && bottom < frame.bottom + 1;
        if (width > 0 && !inside) found.push(`${box.id}: "${text.textContent}" is cut off`);
    }
    for (const kind of [".xtick text", ".ytick text", ".legendtext"]) {
        const texts = [...box.querySelectorAll(kind)].filter((text) => rect(text).width > 0);
        texts.forEach((one, i) => texts.slice(i + 1).forEach((other) => {
            const a = rect(one), b = rect(other);
            if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1)
                found.push(`${box.id}: "${one.textContent}" lies on "${other.textContent}"`);
        }));
    }
    return found;
})"""
# the colour of each figure's paper, and its width
PAPERS = """() => [...document.querySelectorAll(".plot")].map((box) => {
    const svg = box.querySelector("svg.main-svg");
    return [svg.style.background, svg.clientWidth];
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a real study of six parameter sets."""
    folder = write_files(tmp_path_factory.mktemp("search"))
    run = folder / "small search"
    config = StudyConfig(6, SPACE, pruner=PrunerConfig("asha", 2, 1), sampler=SamplerConfig("random"))
    settings = {"monitor.metric": "loss", "data.split.folds": 2, "trainer.max_epochs": 2}
    study = open_study(study_storage(run, config), config, "minimize", Steps(2, 2), settings)
    progress = Progress(config, "loss", 4)
    with StopRequest() as request, Worker(run) as worker:
        queue = StudyQueue(study, study_storage(run, config), worker, config, parse_space(SPACE))
        objective = make(folder, paused_dir=queue.checkpoints, n_trials=6)
        run_trials(queue, objective, until=math.inf, request=request, report=progress)
    write_json(run / "audit.json", AUDIT)
    return write_report(run)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a made-up running study of 2,000 parameter sets."""
    return write_report(make_study(tmp_path_factory.mktemp("study") / "large", 2000, workers=2, running=True))


@pytest.fixture(params=["small", "large"])
def report(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def load(context: BrowserContext, report: Path) -> tuple[Page, list[str]]:
    """The page when its figures are drawn; and its console messages, errors and requests, which should be none."""
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(f"console {message.type}: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    page.wait_for_selector("html[data-drawn]", state="attached")
    return page, [*wrong, *(url for url in asked if url != report.as_uri() and not url.startswith("data:"))]


def wait_for(page: Page, papers: Sequence[Sequence[Any]]) -> None:
    """Wait until the figures have these colours and widths. The page's policy forbids Playwright's own way to wait."""
    for _ in range(100):
        if page.evaluate(PAPERS) == [list(paper) for paper in papers]:
            return
        page.wait_for_timeout(100)
    assert page.evaluate(PAPERS) == [list(paper) for paper in papers]


@pytest.mark.parametrize("form", FORMS)
def test_every_figure_is_drawn_and_legible(browser: Browser, report: Path, form: str, tmp_path: Path) -> None:
    context = browser.new_context(**FORMS[form])
    page, wrong = load(context, report)
    page.screenshot(path=tmp_path / f"{form}.png", full_page=True)
    assert wrong == []
    drawn = page.evaluate(DRAWN)
    assert {"timeline", "best", "curves"} <= set(drawn)
    assert {name for name, one in drawn.items() if not (one["drawn"] and one["marks"] > 0)} == set()
    assert page.evaluate(UNREADABLE) == []
    width = FORMS[form]["viewport"]["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()


def test_a_large_report_opens_in_seconds(browser: Browser, large: Path) -> None:
    """In the page's own clock, from the start of loading until all that the window shows is drawn: three seconds.

    Twice that is allowed here, and the best of five counts, as other processes may be running.
    """
    taken, whole = [], []
    for _ in range(5):
        context = browser.new_context(**FORMS["light"])
        page, _ = load(context, large)
        taken.append(float(page.evaluate("document.documentElement.dataset.opened")) / 1000)
        whole.append(float(page.evaluate("document.documentElement.dataset.drawn")) / 1000)
        context.close()
    print("seconds until it was open:", taken, "and until all figures were drawn:", whole)
    assert min(taken) < 6, taken


def test_figures_follow_the_readers_colours_and_are_light_in_print(
    browser: Browser, report: Path, tmp_path: Path
) -> None:
    context = browser.new_context(**FORMS["dark"])
    page, wrong = load(context, report)
    dark, light = "rgb(23, 28, 34)", "rgb(255, 255, 255)"
    before = page.evaluate(PAPERS)
    assert {color for color, _ in before} == {dark}
    page.emulate_media(color_scheme="light")
    wait_for(page, [(light, width) for _, width in before])
    page.emulate_media(color_scheme="dark")
    wait_for(page, before)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    wait_for(page, [(light, 680) for _ in before])
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    wait_for(page, before)
    page.pdf(path=tmp_path / "print.pdf", format="A4", print_background=True)
    assert (tmp_path / "print.pdf").stat().st_size > 20_000
    assert wrong == []
    context.close()


def test_options_are_copied(browser: Browser, small: Path) -> None:
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page, wrong = load(context, small)
    button = page.locator("button[data-copies=switches]")
    button.click()
    expect(button).to_have_text("Copied")
    assert (
        page.evaluate("navigator.clipboard.readText()") == "trainer.precision: bf16-mixed\ndata.batching.num_workers: 0"
    )
    assert wrong == []
    context.close()


def test_without_scripts_all_but_the_figures_is_there(browser: Browser, small: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(small.as_uri())
    assert "The figures need JavaScript" in str(page.text_content("footer"))
    assert "trainer.precision: bf16-mixed" in str(page.text_content("#switches"))
    assert page.locator("button:visible").count() == 0
    context.close()
