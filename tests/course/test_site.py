"""The website of the course: what its pages show and where they lead. `tests/browser` measures them in a browser."""

from __future__ import annotations

import html.parser
import re
from pathlib import Path

import nbformat
import pytest
from math_core import LatexError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from kd_helpers.course import contents, front_page, notebooks, pages
from kd_helpers.course import site as course_site
from kd_helpers.course.numbers import number
from kd_helpers.course.publish import published

# Elements that have no end.
EMPTY = {"meta", "link", "img", "br", "hr", "input", "wbr", "col", "mspace"}


class Page(html.parser.HTMLParser):
    """What a page links to, loads, shows and can be linked at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[dict[str, str]] = []
        self.loads: list[str] = []
        self.images: list[dict[str, str]] = []
        self.ids: list[str] = []
        self.viewports: list[str] = []
        self.formulas = 0
        self.open: list[str] = []  # the elements round the present text
        self.visible, self.folded, self.code = "", "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag not in EMPTY:
            self.open.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.formulas += tag == "math"
        if tag == "a":
            self.links.append(found)
        if tag == "img":
            self.images.append(found)
        if tag in {"script", "link", "iframe", "source"}:
            self.loads += [found[name] for name in ("src", "href") if name in found]
        if tag == "meta" and found.get("name") == "viewport":
            self.viewports.append(found["content"])
        assert (tag, "open") not in [(tag, name) for name in found] or tag != "details", "a fold is open"

    def handle_endtag(self, tag):
        if tag not in EMPTY:
            assert self.open.pop() == tag, "an element is closed by another's end"

    def handle_data(self, data):
        if {"script", "style"} & {*self.open}:
            self.loads += re.findall(r"(?:@import|import\(|from|url\()\s*[\"']?((?:https?:)?//[^\"')\s]+)", data)
        elif "details" in self.open and "summary" not in self.open:
            self.folded += data
        else:
            self.visible += data

    @property
    def targets(self) -> list[str]:
        return [link["href"] for link in self.links]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[str, Page]:
    folder = tmp_path_factory.mktemp("site")
    course_site.site(notebooks.notebook_paths(), folder)
    return {path.name: Page(path.read_text(encoding="utf-8")) for path in folder.iterdir()}


def rendered(*cells) -> Page:
    """The page of a notebook with these cells."""
    return Page(pages.notebook_content(new_notebook(cells=list(cells))).body)


def entries() -> list[contents.Entry]:
    return [entry for part in contents.parts(notebooks.notebook_paths()) for entry in part.entries]


def test_the_site_has_every_chapter_and_every_page_of_docs(site):
    chapters = {f"{path.stem}.html" for path in notebooks.notebook_paths()}
    docs = {f"{path.stem}.html" for path in (notebooks.ROOT / "docs").glob("*.md")}
    assert set(site) == chapters | docs | {"index.html"}
    assert len(site) == len(chapters) + len(docs) + 1
    assert chapters | docs <= set(site["index.html"].targets)


def test_every_link_within_the_site_leads_somewhere(site):
    repository, ref = published()
    in_repository = f"https://github.com/{repository}/blob/{ref}/"
    for name, page in site.items():
        assert len(page.ids) == len(set(page.ids)), name
        for link in page.targets:
            target, _, anchor = link.partition("#")
            if target.startswith(in_repository):
                assert (notebooks.ROOT / target.removeprefix(in_repository)).exists(), f"{name}: {link}"
            elif not link.startswith("https://"):
                assert not target or target in site, f"{name}: {link}"
                assert not anchor or anchor in site[target or name].ids, f"{name}: {link}"


def test_every_page_leads_to_its_neighbours_and_to_the_contents(site):
    order = [entry.address for entry in entries()]
    for before, name, after in zip([None, *order], order, [*order[1:], None], strict=False):
        for rel, neighbour in (("prev", before), ("next", after)):
            found = [link["href"] for link in site[name].links if link.get("rel") == rel]
            assert found == [neighbour] * (2 if neighbour else 0), name  # at the top and at the bottom
        assert "index.html#contents" in site[name].targets
        assert set(order) <= set(site[name].targets), name


def test_every_section_is_in_the_table_of_contents_of_its_page(site):
    for path in notebooks.notebook_paths():
        cells = nbformat.read(path, as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        headings = re.findall(r"^#{2,4} ", text, re.MULTILINE)
        page = site[f"{path.stem}.html"]
        assert len([link for link in page.targets if link.startswith("#")]) >= 3 * len(headings) >= 15, path.stem


def test_the_front_page_asks_answers_and_says_how_to_start(site):
    page = site["index.html"]
    shown = " ".join(page.visible.split())
    assert "?" in shown
    for spec in ("tuned_teacher - baseline, accuracy", "tuned_teacher - baseline, accuracy, interval"):
        assert number(f"comparison: {spec}") in shown
    for title in ("The tuned teacher itself", "Baseline: labels only"):
        assert title in shown
    assert number("comparison: baseline, accuracy") in shown
    assert {"make run", "make lab"} <= set(re.findall(r"make (?:run|lab)\b", shown))
    assert "Open in Colab" in shown
    for path in notebooks.notebook_paths():
        question = re.sub(r"<[^>]+>", "", html.unescape(pages.inline(notebooks.question(path))))
        assert question.endswith("?")
        assert question in shown
    assert "*" not in shown


def test_the_chart_has_every_arm_within_its_axis():
    rows = front_page.result_chart()["rows"]
    assert [row.title for row in rows if row.distilled]
    for row in rows:
        assert 0 < row.low <= row.mean <= row.high < 100


def test_every_chapter_with_a_figure_has_a_picture_on_its_card(site):
    with_figure = [path for path in notebooks.notebook_paths() if front_page.first_picture(path)]
    described = [image["alt"] for image in site["index.html"].images]
    assert [front_page.first_picture(path).alt for path in with_figure] == described[-len(with_figure) :]


def test_parts_hold_every_chapter_once(tmp_path):
    paths = [Path(f"{number}_x.ipynb") for number in ("00", "08", "09", "10", "15", "16")]
    parts = {part.name: [path.name[:2] for path in part.paths] for part in contents.parts(paths)}
    guides = parts.pop("Guides")
    assert parts == {"The main course": ["00", "08", "09"], "Methods": ["10", "15"], "Scaling": ["16"]}
    assert len(guides) == len(contents.docs_paths()) > 0


def test_titled_cells_and_solutions_are_folded_and_the_rest_is_not(site):
    for path in notebooks.notebook_paths():
        page = site[f"{path.stem}.html"]
        visible, folded = (re.sub(r"\s", "", text) for text in (page.visible, page.folded))
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type != "code":
                continue
            source = re.sub(r"\s", "", cell.source.partition("\n")[2] if notebooks.is_folded(cell) else cell.source)
            hidden = notebooks.is_folded(cell) or "solution" in notebooks.tags(cell)
            assert source in (folded if hidden else visible), cell.source[:60]
            assert hidden or source not in folded
            assert not hidden or cell.source.partition("\n")[0].removeprefix("# @title ") in page.visible
        assert "@title" not in page.visible


def test_a_folded_cell_shows_its_output_and_a_solution_does_not():
    said = [new_output("stream", name="stdout", text="printed\n")]
    plot = rendered(new_code_cell("# @title Draw it\ndraw()", outputs=said))
    assert ("Draw it" in plot.visible, "draw()" in plot.folded, "printed" in plot.visible) == (True, True, True)
    solution = rendered(new_code_cell("answer()", outputs=said, metadata={"tags": ["solution"]}))
    assert "Solution" in solution.visible
    assert ("answer()" in solution.folded, "printed" in solution.folded) == (True, True)


def test_every_picture_of_the_site_is_described_and_in_its_page(site):
    for name, page in site.items():
        for image in page.images:
            assert image["src"].startswith("data:image/png;base64,"), name
            assert len(image["alt"].split()) > 3, f"{name}: {image['alt']}"
    assert sum(len(page.images) for page in site.values()) >= len(notebooks.notebook_paths())


def test_formulas_of_the_site_are_drawn_by_the_browser(site):
    for path in notebooks.notebook_paths():
        cells = nbformat.read(path, as_version=4).cells
        markdown = "\n".join(re.sub(r"`[^`]*`", "", cell.source) for cell in cells if cell.cell_type == "markdown")
        written = len(re.findall(r"\$\$.+?\$\$|(?<![\\\w])\$[^$\n]+?\$", markdown, re.DOTALL))
        assert site[f"{path.stem}.html"].formulas >= written, path.stem


def test_formulas_keep_their_spaces_and_displayed_ones_stand_alone():
    renderer = pages.PageRenderer("notebooks")
    shown = renderer.render("At most $\\log C$:\n\n$$H(p) = -\\sum_i p_i \\log p_i$$")
    assert shown.count("<mi>log</mi>") == 2
    assert len(re.findall(r'<mi>log</mi></mrow><mo lspace="0\.1667em">|<mi>log</mi><mspace', shown)) == 2
    assert re.search(r'<span class="formula"><math display="block"', shown)


def test_a_formula_that_cannot_be_drawn_is_an_error():
    with pytest.raises(LatexError, match="nonsense"):
        pages.PageRenderer("notebooks").render(r"$\nonsense$")


def test_the_site_needs_no_network_and_fits_a_phone(site):
    for name, page in site.items():
        assert page.loads == [], name
        assert page.viewports == ["width=device-width, initial-scale=1.0"], name


def test_only_pages_with_formulas_carry_their_font(tmp_path):
    for text, carried in (("# 00 · A\n\n$x$", True), ("# 00 · A\n\nx", False)):
        nbformat.write(new_notebook(cells=[new_markdown_cell(text)]), tmp_path / "00_a.ipynb")
        course_site.write_page(tmp_path / "00_a.ipynb", tmp_path)
        assert ("data:font/woff2" in (tmp_path / "00_a.html").read_text(encoding="utf-8")) == carried


def test_pages_carry_descriptions_and_link_to_pages():
    picture = new_output(
        "display_data", data={"image/png": "iVBORw0KGgo="}, metadata={"image/png": {"alt": 'a "quoted" line'}}
    )
    text = "# T\n\n[next](01_data.ipynb#top), [contents](../README.md), [![Open](https://x.org/x.svg)](https://x.org)"
    page = rendered(new_markdown_cell(text), new_code_cell("1", outputs=[picture]))
    assert [image["alt"] for image in page.images] == ['a "quoted" line']
    assert page.targets == ["01_data.html#top", "index.html", "https://x.org"]
    assert "Open" in page.visible


@pytest.mark.parametrize(
    ("folder", "url", "leads_to"),
    [
        ("notebooks", "03_losses.ipynb#recap", "03_losses.html#recap"),
        ("notebooks", "../docs/own_data.md", "own_data.html"),
        ("docs", "../notebooks/03_losses.ipynb", "03_losses.html"),
        ("docs", "own_data.md#what-happens", "own_data.html#what-happens"),
        ("docs", "../README.md#start", "index.html#start"),
        ("", "docs/own_data.md", "own_data.html"),
        ("", "#start", "#start"),
        ("docs", "https://arxiv.org/abs/1503.02531", "https://arxiv.org/abs/1503.02531"),
        ("docs", "../kd_helpers/lean.py", "https://github.com/{}/blob/{}/kd_helpers/lean.py"),
    ],
)
def test_links_between_files_become_links_between_pages(folder, url, leads_to):
    assert pages.PageRenderer(folder).address(url) == leads_to.format(*published())


def test_headings_of_the_same_name_can_be_told_apart():
    renderer = pages.PageRenderer("docs")
    renderer.render("## The loss, `T²`\n\n## Next\n\n## Next")
    assert [section.id for section in renderer.sections] == ["the-loss-t²", "next", "next-1"]


def test_the_front_page_names_the_section_that_the_readme_lacks():
    with pytest.raises(ValueError, match=r"README\.md has no heading '## Nowhere'"):
        front_page.readme_section("## Nowhere")
