"""Notebooks and Markdown as HTML: everything a page shows is in it, and folds are closed without a script."""

from __future__ import annotations

import base64
import functools
import html
import posixpath
import re
from collections import Counter
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from math_core import LatexToMathML
from nbconvert.filters import Highlight2HTML, ansi2html
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode

from kd_helpers.course import notebooks
from kd_helpers.course.publish import published

TEMPLATES = Environment(
    loader=PackageLoader("kd_helpers.course"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
TEMPLATES.filters["thousands"] = "{:,}".format
# STIX Two Math 2.11 (SIL Open Font License 1.1), reduced with fonttools to the characters of formulas like ours: few
# systems have a font from which browsers can build roots, braces and sums.
FONT = "STIXTwoMath.woff2"
LONGEST_WORD = 28  # characters of code that fit into a line on a phone
_highlight = Highlight2HTML(pygments_lexer="ipython3")
_formulas = LatexToMathML(fancy_error=False)


@dataclass(frozen=True)
class Section:
    """A heading of a page: its level, the id that links lead to, and its text."""

    level: int
    id: str
    text: str


@dataclass(frozen=True)
class Content:
    """What a page shows: its headings below the title, and its body."""

    sections: list[Section]
    body: str


class PageRenderer(IPythonRenderer):
    """Markdown of one page: formulas as MathML, badges as words, links to other pages of the course as such.

    Args:
        folder: where in the repository the text is, "notebooks" for instance; its links start there.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(escape=False)
        self.folder = folder
        self.sections: list[Section] = []
        self.anchors: Counter[str] = Counter()

    def heading(self, text: str, level: int, **attrs: Any) -> str:
        if level == 1:
            number, name = chapter_and_title(text)
            chapter = f'<p class="kicker">Chapter {number}</p>\n' if number else ""
            return f"{chapter}<h1>{name}</h1>\n"
        words = re.sub(r"[^\w\- ]", "", html.unescape(re.sub(r"<[^>]+>", "", text))).strip()
        anchor = words.lower().replace(" ", "-")  # as on GitHub
        self.anchors[anchor] += 1
        if self.anchors[anchor] > 1:
            anchor += f"-{self.anchors[anchor] - 1}"
        self.sections.append(Section(level, anchor, text))
        link = f'<a class="anchor" href="#{anchor}" aria-label="Link to this section">#</a>'
        return f'<h{level} id="{anchor}">{text} {link}</h{level}>\n'

    def codespan(self, text: str) -> str:
        """Code within a sentence; a single word, such as an option, stays on one line."""
        code = super().codespan(text)
        whole = len(text) <= LONGEST_WORD and " " not in text
        return code.replace("<code>", '<code class="word">', 1) if whole else code

    def inline_math(self, body: str) -> str:
        return _formulas.convert_with_local_state(body, displaystyle=False)

    def block_math(self, body: str) -> str:
        return f'<span class="formula">{_formulas.convert_with_local_state(body, displaystyle=True)}</span>'

    def block_html(self, html: str) -> str:
        """HTML as it is, without comments, and with its formulas drawn."""
        shown = re.sub(r"(?s)<!--.*?-->", "", super().block_html(html))
        return re.sub(r"\$([^$\n]+)\$", lambda formula: self.inline_math(formula[1]), shown)

    def inline_html(self, html: str) -> str:
        return "" if html.startswith("<!--") else super().inline_html(html)

    def table(self, text: str) -> str:
        return f'<div class="wide"><table>{text}</table></div>\n'

    def image(self, text: str, url: str, title: str | None = None) -> str:
        """A picture of the repository goes into the page; one from a server is a badge, whose words suffice."""
        if url.startswith("https://"):
            return f'<span class="badge">{text}</span>'
        picture = (notebooks.ROOT / self.folder / url).read_bytes()
        return TEMPLATES.get_template("picture.html.j2").render(data=base64.b64encode(picture).decode(), alt=text)

    def link(self, text: str, url: str, title: str | None = None) -> str:
        return super().link(text, self.address(url), title)

    def address(self, url: str) -> str:
        """Where a link leads: to a page of the site, else to the file on GitHub, else to where it led before."""
        if re.match(r"[a-z]+:|#", url):
            return url
        path, mark, anchor = url.partition("#")
        target = posixpath.normpath(posixpath.join(self.folder, path))
        if re.fullmatch(r"README\.md|docs/\w+\.md|notebooks/\w+\.ipynb", target):
            return page_name(Path(target)) + mark + anchor
        repository, ref = published()
        return f"https://github.com/{repository}/blob/{ref}/{target}{mark}{anchor}"

    def render(self, source: str) -> str:
        """Markdown as HTML."""
        return MarkdownWithMath(renderer=self).render(source)


def page_name(source: Path) -> str:
    """The file name of the page that shows a notebook or a Markdown file; the README's place is the front page."""
    return "index.html" if source.name == "README.md" else f"{source.stem}.html"


def chapter_and_title(title: str) -> tuple[str, str]:
    """A title such as "03 · The loss" in two; other titles have no number."""
    number, _, rest = title.partition(" · ")
    return (number, rest) if number.isdigit() else ("", title)


def inline(source: str) -> str:
    """A title or a question, one line of Markdown, as HTML."""
    return re.sub(r"^<p>|</p>\n?$", "", PageRenderer("notebooks").render(source))


def page(template: str, **shown: Any) -> str:
    """A whole page: a template of the folder `templates`, with what it shows."""
    repository, _ = published()
    readme = (notebooks.ROOT / "README.md").read_text(encoding="utf-8")
    site = readme.partition("\n")[0].removeprefix("# ")
    return TEMPLATES.get_template(template).render(site=site, repository=repository, font=_font, **shown)


@functools.cache
def _font() -> str:
    """The font of the formulas as base64."""
    return base64.b64encode(resources.files(__package__).joinpath("templates", FONT).read_bytes()).decode()


def text_content(source: str, folder: str) -> Content:
    """A Markdown file of that folder of the repository."""
    renderer = PageRenderer(folder)
    body = renderer.render(source)
    return Content(renderer.sections, body)


def notebook_content(notebook: NotebookNode) -> Content:
    """A notebook with the outputs it has; titled cells and solutions are closed."""
    renderer = PageRenderer("notebooks")
    cells = [_cell(cell, renderer) for cell in notebooks.without_bars(notebook).cells]
    body = TEMPLATES.get_template("notebook.html.j2").render(cells=cells)
    return Content(renderer.sections, body)


def _cell(cell: NotebookNode, renderer: PageRenderer) -> dict[str, Any]:
    """What the template needs of a cell."""
    if cell.cell_type == "markdown":
        # The page has links to its neighbours; of the generated cell, the badges remain.
        badges = "navigation" in notebooks.tags(cell)
        source = cell.source.partition("\n\n")[0] if badges else cell.source
        return {"text": renderer.render(source), "kind": "badges" if badges else "text"}
    title, code = None, cell.source
    if notebooks.is_folded(cell):
        first, _, code = code.partition("\n")
        title = first.removeprefix("# @title ")
    return {
        "kind": "solution" if "solution" in notebooks.tags(cell) else "code",
        "title": title,
        "code": _highlight(code.strip("\n")),
        "outputs": [_output(output, renderer) for output in _joined(cell.outputs)],
    }


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """The outputs, with what was printed piece by piece in one piece."""
    joined: list[NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream" and joined and joined[-1].output_type == "stream":
            joined[-1] = NotebookNode(joined[-1], text=joined[-1].text + output.text)
        else:
            joined.append(output)
    return joined


def _output(output: NotebookNode, renderer: PageRenderer) -> dict[str, Any]:
    """What the template needs of an output, in the richest form that it has."""
    data = output.get("data", {"text/plain": output.get("text", "")})
    if "text/html" in data:
        return {"table": re.sub(r'(?s)<style.*?</style>| border="1"', "", data["text/html"])}
    if "text/markdown" in data:
        return {"text": renderer.render(data["text/markdown"])}
    if "image/png" in data:
        about = {"alt": "figure", **output.metadata.get("image/png", {})}
        return {"data": data["image/png"].replace("\n", ""), "alt": about["alt"], "width": about.get("width")}
    return {"printed": ansi2html(data["text/plain"].rstrip("\n"))}
