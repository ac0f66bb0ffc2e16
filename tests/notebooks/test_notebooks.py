"""What every notebook must look like (its outputs are compared by `pytest --nbval`)."""

from __future__ import annotations

import ast
import re

import nbformat
import pytest
from nbformat import NotebookNode

from kd_helpers.course.notebooks import WIDGET, is_folded, notebook_paths, tags
from kd_helpers.course.numbers import fill, without_marked
from kd_helpers.course.publish import navigation, setup

PATHS = notebook_paths()
pytestmark = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)

# A result as one would type it: "74.9%", "2.6 points", "0.63 nats", "77%", "35 s". Round percentages (an 80%
# confidence, a 95% interval) are conventions and examples.
MEASURED = re.compile(r"\b(\d+\.\d+\s?(%|points|nats)|\d*[1-46-9]\s?%|\d+(\.\d+)?\s?(s|ms|seconds|MB)\b)")
# Lines that quote a source, and so may have its numbers.
QUOTED = re.compile(r"\barXiv\b|\bet al\.|\breported\b|\(20[0-2]\d\)|\b\d{4}\.\d{4,5}\b")


@pytest.fixture
def notebook(path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def markdown_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "markdown"]


def test_course_is_numbered(path):
    assert [p.name[:2] for p in PATHS[:9]] == ["00", "01", "02", "03", "04", "05", "06", "07", "08"]
    assert re.fullmatch(r"\d\d_[a-z_]+", path.stem)


def test_every_code_cell_was_executed_in_order(path, notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


def test_opening(path, notebook):
    cells = notebook.cells
    assert cells[0].source.startswith(f"# {path.stem[:2]} · ")
    assert tags(cells[1]) == ["navigation"]
    assert "You will be able to" in cells[2].source
    assert 3 <= len(re.findall(r"^\d\. ", cells[2].source, re.MULTILINE)) <= 5
    assert tags(cells[3]) == ["setup"]
    assert "import" in cells[4].source
    assert [index for index, cell in enumerate(cells) if "parameters" in tags(cell)] == [5]
    assert "seed_everything" in cells[6].source


def test_generated_cells_are_current(path, notebook):
    sources = {tag: cell.source for cell in notebook.cells for tag in tags(cell)}
    assert sources["navigation"] == navigation(path)
    assert sources["setup"] == setup()


def test_parameters_are_typed_literals_with_a_comment(path, notebook):
    lines = next(cell for cell in notebook.cells if "parameters" in tags(cell)).source.splitlines()
    names = []
    for line in lines:
        assert re.search(r"  # \w", line), line
        (statement,) = ast.parse(line).body
        assert isinstance(statement, ast.AnnAssign), line
        ast.literal_eval(statement.value)
        names.append(statement.target.id)
    assert {"preset", "seed"} <= set(names)


def test_closing(path, notebook):
    text = "\n".join(cell.source for cell in markdown_cells(notebook))
    headings = re.findall(r"^## .+$", text, re.MULTILINE)
    closing = ["## Recap", "## Exercises", "## Pitfalls", "## References", "## Next"]
    assert [heading for heading in headings if heading in closing] == closing
    (check,) = [cell for cell in notebook.cells if "check" in tags(cell)]
    assert "assert " in check.source
    assert check.outputs[0].text == "All checks passed.\n"
    assert "arXiv" in text.split("## References")[1]


def test_exercises_have_a_check_and_a_folded_solution(path, notebook):
    solutions = [cell for cell in notebook.cells if "solution" in tags(cell)]
    assert 2 <= len(solutions) <= 4
    assert all(cell.metadata.jupyter.source_hidden for cell in solutions)
    assert all("check_" in cell.source for cell in solutions)
    hints = sum(cell.source.count("<details>") for cell in markdown_cells(notebook))
    assert hints >= len(solutions)
    assert sum("attempt(check_" in cell.source for cell in code_cells(notebook)) == len(solutions)


def test_nothing_but_results_is_stored(path, notebook):
    assert "widgets" not in notebook.metadata
    assert "papermill" not in notebook.metadata
    for cell in code_cells(notebook):
        assert "execution" not in cell.metadata
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            assert WIDGET not in output.get("data", {})
            assert "image/svg+xml" not in output.get("data", {})
            text = str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
            assert not re.search(r"(/home/|/tmp/|/root/|/work/|site-packages|object at 0x)", text)


def test_figures_have_a_description(path, notebook):
    images = [o for cell in code_cells(notebook) for o in cell.outputs if "image/png" in o.get("data", {})]
    assert images
    assert all(image.metadata["image/png"]["alt"] for image in images)


def test_no_measured_number_is_typed(path, notebook):
    """Results in prose carry a marker; what a paper reports and the times in the opening may be typed."""
    for cell in markdown_cells(notebook)[3:]:
        for line in without_marked(cell.source).splitlines():
            assert QUOTED.search(line) or not MEASURED.search(line), line


def test_marked_numbers_are_those_of_the_stored_results(path, notebook):
    for cell in markdown_cells(notebook):
        assert cell.source == fill(cell.source)


def test_code_that_serves_is_folded(path, notebook):
    for cell in code_cells(notebook):
        folded = cell.metadata.get("jupyter", {}).get("source_hidden", False)
        assert folded == is_folded(cell), cell.source[:60]
        assert (cell.metadata.get("cellView") == "form") == folded, cell.source[:60]


def names_set_by(code: str) -> set[str]:
    """The notebook's own names to which a cell's statements assign; those within functions and the like are not."""
    scopes = (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    waiting, found = [ast.parse("\n".join(line for line in code.splitlines() if not line.startswith("%")))], set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        waiting += [child for child in ast.iter_child_nodes(node) if not isinstance(child, scopes)]
    return found


def test_no_cell_changes_a_parameter_once_they_were_checked(path, notebook):
    """Or a reader who runs an earlier cell again gets another run than the parameters say."""
    parameters = names_set_by(notebook.cells[5].source)
    for cell in notebook.cells[7:]:  # the sixth checks them, and may fill in a number
        if cell.cell_type == "code":
            assert not names_set_by(cell.source) & parameters, cell.source[:60]


def test_visible_code_is_short_and_narrow(path, notebook):
    for cell in code_cells(notebook):
        if not is_folded(cell):
            lines = cell.source.splitlines()
            assert len(lines) <= 25, cell.source[:60]
            assert max(map(len, lines)) <= 88, max(lines, key=len)


def test_text_between_code_is_short(path, notebook):
    words = sum(len(cell.source.split()) for cell in markdown_cells(notebook))
    assert words >= 800
    body = notebook.cells[3 : next(i for i, cell in enumerate(notebook.cells) if "check" in tags(cell))]
    run = 0
    for cell in body:
        read = re.sub(r"<!--.*?-->", "", cell.source)  # nobody sees a marker
        run = run + len(read.split()) if cell.cell_type == "markdown" else 0
        assert run <= 120, cell.source[:60]


def test_most_outputs_are_compared(path, notebook):
    shown = [cell for cell in code_cells(notebook) if cell.outputs]
    compared = [cell for cell in shown if "nbval-ignore-output" not in tags(cell)]
    assert len(compared) >= 0.5 * len(shown)
    assert "nbval-skip" not in {tag for cell in notebook.cells for tag in tags(cell)}


def test_words_of_the_course(path, notebook):
    text = " ".join(re.sub(r"`[^`]*`", "", cell.source) for cell in markdown_cells(notebook))
    assert not re.search(r"\b(optimizers?|initiali[z]e\w*|dark-knowledge loss|teacher forcing)\b", text)
