from __future__ import annotations

import json
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from kd_helpers import artifacts, course


@pytest.mark.parametrize(
    ("name", "content", "figure"),
    [
        ("results", course.readme_results, course.README_FIGURE),
        ("benchmark", course.readme_benchmark, course.SPEED_FIGURE),
    ],
)
def test_readme_shows_what_is_stored(name, content, figure):
    text = (course.ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split(f"<!-- {name}: written by `make {name}` -->")[1].split(f"<!-- end of {name} -->")[0]
    assert content() in block
    assert f"]({figure})" in block
    assert (course.ROOT / figure).exists()


def test_readme_names_every_notebook_and_every_command():
    text = (course.ROOT / "README.md").read_text(encoding="utf-8")
    for path in course.notebook_paths():
        assert f"(notebooks/{path.name})" in text
    for name in re.findall(r"\]\((notebooks/[^)]+)\)", text):
        assert (course.ROOT / name).exists()
    targets = re.findall(r"^([a-z]+):.*## ", (course.ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in re.findall(r"`?make ([a-z]+)\b", text):
        assert command in targets or command in {"lists", "test"}


def test_bars_and_clocks_are_not_stored():
    bar = new_output("display_data", data={course.WIDGET: {"model_id": "x"}, "text/plain": "  0%|"})
    shown = new_output("stream", name="stdout", text="kept\n")
    notebook = new_notebook(cells=[new_code_cell("1", outputs=[bar, shown], metadata={"execution": {"a": "clock"}})])
    notebook.metadata.widgets = {"state": {}}
    cleaned = course.without_bars(notebook)
    assert [output.text for output in cleaned.cells[0].outputs] == ["kept\n"]
    assert "execution" not in cleaned.cells[0].metadata
    assert "widgets" not in cleaned.metadata


def test_pages_carry_descriptions_and_link_to_pages():
    picture = new_output(
        "display_data", data={"image/png": "iVBORw0KGgo="}, metadata={"image/png": {"alt": 'a "quoted" line'}}
    )
    cells = [new_markdown_cell("# T\n\n[next](01_data.ipynb)"), new_code_cell("1", outputs=[picture])]
    page = course.to_html(new_notebook(cells=cells), "T")
    assert 'alt="a &quot;quoted&quot; line"' in page
    assert 'href="01_data.html"' in page
    assert "No description has been provided" not in page


def test_a_run_leaves_notebooks_pages_and_an_index(tmp_path, capsys):
    source = tmp_path / "00_tiny.ipynb"
    cells = [new_markdown_cell("# 00 · Tiny"), new_code_cell("x: int = 1  # one", metadata={"tags": ["parameters"]})]
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    nbformat.write(new_notebook(cells=[*cells, new_code_cell("print(x)")], metadata=kernel), source)
    course.run([source], tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"00_tiny.ipynb", "00_tiny.html", "index.html"}
    assert "00 · Tiny" in (tmp_path / "out" / "index.html").read_text()
    assert "[1/1] 00_tiny" in capsys.readouterr().out


def test_a_notebook_that_warns_is_not_stored(tmp_path):
    source = tmp_path / "00_loud.ipynb"
    loud = new_notebook(cells=[new_markdown_cell("# 00"), new_code_cell("import sys; print('!', file=sys.stderr)")])
    nbformat.write(loud, source)
    before = source.read_text()
    with pytest.raises(RuntimeError, match="writes to stderr"):
        course.store([source])
    assert source.read_text() == before


def test_unknown_number_is_refused(capsys):
    with pytest.raises(SystemExit):
        course.main(["run", "99"])
    assert "no notebook is numbered 99" in capsys.readouterr().err


def test_stored_notebooks_are_valid_json_with_a_kernel():
    for path in course.notebook_paths():
        content = json.loads(path.read_text(encoding="utf-8"))
        assert content["metadata"]["kernelspec"]["name"] == "python3"


def test_an_unfinished_sweep_is_not_stored(own_artifacts):
    stored = course.ROOT / "kd_helpers" / "results" / f"{course.SWEEP}.json"
    before = stored.read_bytes()
    setting = {"parameters": {"alpha": 0.0, "seed": 0}, "run": "alpha=0.0"}
    plan = {"notebook": course.SWEPT.stem, "settings": [setting]}
    artifacts.save_json(own_artifacts / "sweeps" / course.SWEEP / "plan.json", plan)
    with pytest.raises(RuntimeError, match=r"runs are missing: {'planned': 1}; run `make sweep`"):
        course.store_sweep()
    assert stored.read_bytes() == before
