"""The pages of the site as a reader sees them. Screenshots in light and dark are left in `artifacts/browser`.

At 1,200 pixels at most a third of a chapter's height is visible code, and nothing scrolls sideways; at 390 pixels, a
phone, what is wide scrolls in its own box and the page does not.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kd_helpers import artifacts
from kd_helpers.course.contents import parts
from kd_helpers.course.notebooks import notebook_paths
from kd_helpers.course.site import site

CHAPTERS = [path.stem for path in notebook_paths()]
NAMES = ["index", *(path.stem for part in parts(notebook_paths()) for path in part.paths)]
DESKTOP, PHONE = 1200, 390
MOST_CODE = 1 / 3
MOST_PIXELS = 8000  # of a screenshot's height; Chromium sometimes refuses one of 25,000

# The height of the code that is not folded, and that of the page.
HEIGHTS = """() => [
  [...document.querySelectorAll(".code")].filter(code => code.checkVisibility())
    .reduce((sum, code) => sum + code.getBoundingClientRect().height, 0),
  document.documentElement.scrollHeight,
]"""
# What can be scrolled sideways, in words; the first of them is the page itself, where it can.
SIDEWAYS = """() => [...document.querySelectorAll("*")]
  .filter(one => one.checkVisibility() && one.scrollWidth > one.clientWidth + 1)
  .filter(one => one === document.documentElement || /auto|scroll/.test(getComputedStyle(one).overflowX))
  .map(one => `${one.tagName} ${one.scrollWidth - one.clientWidth} px: ${one.innerText.slice(0, 60)}`)"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("site")
    site(notebook_paths(), made)
    return made


@pytest.fixture
def visit(browser, folder):
    """Opens a page of the site; further arguments are those of a browser's context."""
    contexts = []

    def open_page(name: str, *, width: int = DESKTOP, **choices):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **choices))
        page = contexts[-1].new_page()
        page.goto((folder / f"{name}.html").as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("name", CHAPTERS)
def test_at_most_a_third_of_a_chapter_is_visible_code(visit, name):
    code, height = visit(name).evaluate(HEIGHTS)
    assert code / height <= MOST_CODE, f"{code / height:.1%} of {height:,} pixels"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_scrolls_sideways_on_a_desktop(visit, name):
    assert visit(name).evaluate(SIDEWAYS) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_as_wide_as_a_phone(visit, name):
    page = visit(name, width=PHONE)
    assert not [one for one in page.evaluate(SIDEWAYS) if one.startswith("HTML")]
    pictures = page.locator("img").evaluate_all("all => all.map(one => one.getBoundingClientRect().right)")
    assert max(pictures, default=0) <= PHONE


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [DESKTOP, PHONE])
@pytest.mark.parametrize("name", NAMES)
def test_a_page_follows_the_theme_of_the_system(visit, name, width, theme):
    page = visit(name, width=width, color_scheme=theme)
    height = page.evaluate("() => document.documentElement.scrollHeight")
    for piece, top in enumerate(range(0, height, MOST_PIXELS)):
        page.screenshot(
            path=artifacts.artifacts_dir() / "browser" / f"site-{name}-{width}-{theme}-{piece}.png",
            full_page=True,
            clip={"x": 0, "y": top, "width": width, "height": min(MOST_PIXELS, height - top)},
        )
    text, background = (brightness(page, "body", style) for style in ("color", "backgroundColor"))
    assert (text < background) == (theme == "light")
    assert abs(text - background) > 150
    for picture in page.locator("img").all()[:3]:
        assert picture.evaluate("one => getComputedStyle(one).backgroundColor") == "rgb(255, 255, 255)"


def brightness(page, selector: str, style: str) -> float:
    """How bright a colour is, from 0 to 255."""
    colour = page.locator(selector).first.evaluate(f"one => getComputedStyle(one).{style}")
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3


def test_a_reader_chooses_the_theme_and_the_next_page_keeps_it(visit):
    page = visit(CHAPTERS[0], color_scheme="light")
    page.get_by_role("button", name="Light or dark").click()
    assert brightness(page, "body", "backgroundColor") < 60
    page.get_by_role("link", name="Next").first.click()
    page.wait_for_url(f"**/{CHAPTERS[1]}.html")
    assert brightness(page, "body", "backgroundColor") < 60
    page.get_by_role("button", name="Light or dark").click()
    assert brightness(page, "body", "backgroundColor") > 200


def test_folds_open_and_links_lead_on_without_scripts(visit):
    page = visit(CHAPTERS[3], java_script_enabled=False)
    fold = page.locator("details", has=page.locator(".code")).first
    assert not fold.locator(".code").is_visible()
    fold.locator("summary").click()
    assert fold.locator(".code").is_visible()
    page.get_by_role("link", name="Contents").click()
    page.wait_for_url("**/index.html#contents")
    assert not page.locator("#theme").is_visible()


def test_the_sections_are_beside_the_text_on_a_desktop_and_folded_on_a_phone(visit):
    page = visit(CHAPTERS[3])
    section = page.locator("aside nav a").last
    section.click()
    assert page.locator(f"[id='{section.get_attribute('href')[1:]}']").bounding_box()["y"] < 900
    page = visit(CHAPTERS[3], width=PHONE)
    assert not page.locator("aside").is_visible()
    assert page.locator(".toc > summary").is_visible()
    assert not page.locator(".toc a").first.is_visible()


def test_formulas_have_their_font_and_are_displayed_in_the_middle(visit):
    page = visit("03_losses")
    assert page.evaluate("() => document.fonts.ready.then(() => document.fonts.check('1em \"Course Math\"'))")
    for formula in page.locator(".formula:visible").all():
        left, middle = formula.bounding_box(), formula.locator("math").bounding_box()
        assert abs((left["x"] + left["width"] / 2) - (middle["x"] + middle["width"] / 2)) < 2
