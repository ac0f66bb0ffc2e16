"""Notebooks as pages: HTML that loads nothing from the network and can be read on a phone."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, pass_context
from latex2mathml.converter import convert as latex_to_mathml
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode

from kd_helpers import artifacts
from kd_helpers.course.notebooks import question, title

# Wide things scroll inside their own box, so that the page itself never does; on a phone the prompts give way.
STYLE = """
main { max-width: 62rem; margin: 0 auto; }
img { max-width: 100%; height: auto; }
.badge { border: 1px solid; border-radius: 0.3em; padding: 0.1em 0.5em; }
pre, table, math[display="block"] { display: block; max-width: 100%; overflow-x: auto; }
math[display="block"] { padding: 0.3em 0; }
.jp-RenderedHTMLCommon table { width: max-content; margin-left: 0; }
.jp-RenderedHTMLCommon :not(pre) > code { overflow-wrap: break-word; }
.jp-RenderedText pre { white-space: pre; word-break: normal; }
.jp-InputArea, .jp-OutputArea-child, .jp-OutputArea-output, .jp-MarkdownOutput { min-width: 0; }
summary { cursor: pointer; padding: 0.4em; font: 1rem system-ui, sans-serif; }
@media (max-width: 40rem) {
  body.jp-Notebook, .jp-Notebook .jp-Cell { padding: 0.3rem; }
  .jp-InputPrompt, .jp-OutputPrompt { display: none; }
  .jp-RenderedHTMLCommon { padding-right: 0; }
}
"""
# Solutions whole, and the code of cells that begin with a title, as JupyterLab and Colab fold them.
FOLD = """
function fold(element, name) {
  const folded = document.createElement("details");
  folded.append(document.createElement("summary"));
  folded.firstChild.textContent = name;
  element.before(folded);
  folded.append(element);
}
for (const cell of document.querySelectorAll(".celltag_solution")) fold(cell, "Solution");
for (const code of document.querySelectorAll(".jp-CodeCell:not(.celltag_solution) .jp-Cell-inputWrapper")) {
  const title = code.querySelector(".highlight")?.textContent.trim().match(/^# @title (.+)/);
  if (title) fold(code, title[1]);
}
"""
# Without RequireJS, MathJax and Mermaid, which come from servers; with the descriptions that figures carry.
TEMPLATE = f"""
{{%- extends "lab/index.html.j2" -%}}
{{%- block html_head_js -%}}{{%- endblock -%}}
{{%- block html_head_js_mathjax -%}}{{%- endblock -%}}
{{%- block html_head_js_mermaidjs -%}}{{%- endblock -%}}
{{%- block html_head_css -%}}<style>{STYLE}</style>{{%- endblock -%}}
{{%- block data_png scoped -%}}
{{%- set alt = output | get_metadata("alt", "image/png") or "figure" -%}}
{{{{ super() | replace("<img ", '<img alt="' ~ (alt | escape_html) ~ '" ', 1) }}}}
{{%- endblock -%}}
{{%- block body_footer -%}}<script>{FOLD}</script>{{{{ super() }}}}{{%- endblock -%}}
"""
INDEX = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1.0">
<title>{title}</title>
<style>
body {{ max-width: 62rem; margin: 0 auto; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; color: #222; }}
td, th {{ padding: 0.6rem 1rem 0.6rem 0; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }}
table {{ border-collapse: collapse; }}
@media (max-width: 40rem) {{ thead {{ display: none; }} tr, td {{ display: block; }} td + td {{ padding-top: 0; }}
  td:first-child {{ border: 0; padding-bottom: 0.2rem; }} }}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p>{about}</p>
<table>
<thead><tr><th>chapter</th><th>question</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
</main>
</body>
</html>
"""


class OfflineRenderer(IPythonRenderer):
    """Formulas as MathML, which browsers draw by themselves; badges as words; links to notebooks as links to pages."""

    def inline_math(self, body: str) -> str:
        return latex_to_mathml(body)

    def block_math(self, body: str) -> str:
        return latex_to_mathml(body, display="block")

    def block_html(self, html: str) -> str:
        return re.sub(r"\$([^$\n]+)\$", lambda formula: latex_to_mathml(formula[1]), super().block_html(html))

    def image(self, text: str, url: str, title: str | None = None) -> str:
        if url.startswith("https://"):
            return f'<span class="badge">{text}</span>'
        return super().image(text, url, title)

    def link(self, text: str, url: str, title: str | None = None) -> str:
        page = re.sub(r"^(\d\d_\w+)\.ipynb", r"\1.html", url).replace("../README.md", "index.html")
        return super().link(text, page, title)


class OfflineExporter(HTMLExporter):
    """Notebook to page, with solutions folded."""

    def __init__(self) -> None:
        super().__init__(extra_loaders=[DictLoader({"course.html.j2": TEMPLATE})], template_file="course.html.j2")

    @pass_context
    def markdown2html(self, context: Any, source: str) -> str:
        return MarkdownWithMath(renderer=OfflineRenderer(escape=False)).render(source)


def to_html(notebook: NotebookNode, heading: str) -> str:
    """A notebook as a page."""
    page, _ = OfflineExporter().from_notebook_node(notebook, resources={"metadata": {"name": heading}})
    return page


def write_index(paths: Sequence[Path], folder: Path, *, name: str, about: str) -> None:
    """Put the page that lists chapters and their questions into `folder`."""
    row = '<tr><td><a href="{}.html">{}</a></td><td>{}</td></tr>'
    rows = [row.format(path.stem, html.escape(title(path)), html.escape(question(path))) for path in paths]
    page = INDEX.format(title=html.escape(name), about=html.escape(about), rows="\n".join(rows))
    artifacts.write_text(folder / "index.html", page)
