"""The explorers as a reader meets them: JupyterLab in a real browser. `make test-browser` runs this.

Every notebook that holds an explorer is run in JupyterLab; each control is then worked as a reader would, and the
picture must change. Screenshots in light and dark are left in `artifacts/browser`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from support.explorer_notebook import explorer_notebook
from support.processes import free_port, path_with_tests

from kd_helpers import artifacts
from kd_helpers.artifacts import save_json
from kd_helpers.course.notebooks import notebook_paths

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: `make test-browser` installs it")

SMALL = "explorers"  # the generated notebook: every explorer, tiny models, seconds
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
MINUTES = 60_000  # playwright counts milliseconds
EXPLORER = ".widget-vbox:has(> img.widget-image)"

# What a reader does with each explorer: which control, and how.
ACTIONS = {
    "temperature": [("slider", 0), ("menu", 0)],
    "loss": [("slider", 0), ("slider", 1)],
    "predictions": [("sentence", 0)],
    "sweep": [("menu", 0), ("menu", 1)],
    "stories": [("sentence", 0), ("slider", 0), ("slider", 1)],
}


def explorers_in(notebook: nbformat.NotebookNode) -> list[str]:
    """The explorers that a notebook shows, in order: "temperature" for `temperature_explorer(…)`."""
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return re.findall(r"^(?:\w+\.)?(\w+)_explorer\(", code, re.MULTILINE)


def notebooks_to_visit() -> dict[str, nbformat.NotebookNode]:
    """By name: the generated notebook, and every chapter that shows an explorer."""
    chapters = {path.stem: nbformat.read(path, as_version=4) for path in notebook_paths()}
    return {SMALL: explorer_notebook()} | {name: chapter for name, chapter in chapters.items() if explorers_in(chapter)}


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[str]:
    """A JupyterLab of the test's own, with copies of the notebooks and nobody's settings. Its address."""
    home = tmp_path_factory.mktemp("lab")
    (home / "notebooks").mkdir()
    for name, notebook in notebooks_to_visit().items():
        nbformat.write(notebook, home / "notebooks" / f"{name}.ipynb")
    settings = home / "settings" / "@jupyterlab"
    save_json(settings / "apputils-extension" / "notification.jupyterlab-settings", {"fetchNews": "false"})
    # Cells out of sight stay in the page, so that they can be found.
    save_json(settings / "notebook-extension" / "tracker.jupyterlab-settings", {"windowingMode": "none"})
    own = {f"JUPYTER_{kind}_DIR": str(home / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    own |= {"JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces")}
    own |= {"IPYTHONDIR": str(home / "ipython")} | path_with_tests()
    own |= {"KD_ARTIFACTS": str(artifacts.artifacts_dir())}
    port = free_port()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}"]
    command += ["--ServerApp.ip=127.0.0.1", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={home / 'notebooks'}"]
    command += ["--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True"]
    address, log = f"http://127.0.0.1:{port}", home / "log"
    with log.open("w") as written:
        server = subprocess.Popen(command, env=os.environ | own, stdout=written, stderr=subprocess.STDOUT)
    try:
        _wait_for(address, server, log)
        yield address
    finally:
        server.terminate()
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            server.kill()


def _wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(240):
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{address}/api", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.5)
    pytest.fail(f"JupyterLab does not start: {log.read_text()[-2000:]}")


@pytest.fixture
def page(browser):
    opened = browser.new_page(viewport={"width": 1200, "height": 900}, device_scale_factor=2)
    yield opened
    opened.close()


def open_notebook(page, lab: str, name: str) -> None:
    page.goto(f"{lab}/lab/tree/{name}.ipynb?reset")
    page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=2 * MINUTES)
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.ready")


def run_all(page, timeout: float) -> None:
    """Run every cell as the menu does, and wait until the last has finished, none with an error."""
    page.evaluate(
        "() => { window.ended = null;"
        " window.jupyterapp.commands.execute('notebook:run-all-cells').finally(() => { window.ended = true; }); }"
    )
    page.wait_for_function("() => window.ended", timeout=timeout)
    cells = page.evaluate("() => window.jupyterapp.shell.currentWidget.content.model.toJSON().cells")
    code = [cell for cell in cells if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]
    errors = [output for cell in code for output in cell["outputs"] if output["output_type"] == "error"]
    assert not errors, f"{errors[0]['ename']}: {errors[0]['evalue']}"
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))


def work(explorer, control: str, number: int) -> None:
    """Do what a reader would do with a control."""
    if control == "slider":
        explorer.locator(".noUi-handle").nth(number).press("ArrowRight")
    elif control == "menu":
        menu = explorer.locator("select").nth(number)
        menu.select_option(index=1)
    else:
        sentence = explorer.locator("input[type=text]").nth(number)
        sentence.fill("I have never been so disappointed in my life.")
        sentence.press("Enter")


def words(explorer) -> str:
    return explorer.locator(".widget-html").last.inner_text()


def set_theme(page, theme: str) -> None:
    page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", theme)
    page.wait_for_selector(f"body[data-jp-theme-name='{theme}']", state="attached")


@pytest.mark.parametrize("name", notebooks_to_visit())
def test_explorers_answer_in_jupyterlab(lab, page, name):
    open_notebook(page, lab, name)
    run_all(page, timeout=(2 if name == SMALL else 20) * MINUTES)
    kinds = explorers_in(notebooks_to_visit()[name])
    shown = page.locator(EXPLORER)
    playwright.expect(shown).to_have_count(len(kinds), timeout=MINUTES)
    for index, kind in enumerate(kinds):
        explorer = shown.nth(index)
        picture = explorer.locator("img.widget-image")
        for control, number in ACTIONS[kind]:
            explorer.scroll_into_view_if_needed()
            source, said = picture.get_attribute("src"), words(explorer)
            work(explorer, control, number)
            playwright.expect(picture).not_to_have_attribute("src", source, timeout=MINUTES)
            playwright.expect(explorer.locator(".widget-html").last).not_to_have_text(said, timeout=MINUTES)
        natural, drawn = picture.evaluate("image => [image.naturalWidth, image.clientWidth]")
        assert natural >= 2 * drawn > 0, "the picture is not sharp on a screen with two pixels a point"
    for theme in THEMES:
        set_theme(page, THEMES[theme])
        for index, kind in enumerate(kinds):
            explorer = shown.nth(index)
            explorer.scroll_into_view_if_needed()
            folder = artifacts.artifacts_dir() / "browser"
            explorer.screenshot(path=folder / f"{name}-{kind}-{theme}.png")
            page.screenshot(path=folder / f"{name}-{kind}-{theme}-page.png")


def test_every_explorer_is_visited():
    """No explorer without something to do, and none that the generated notebook leaves out."""
    assert sorted(explorers_in(explorer_notebook())) == sorted(ACTIONS)
    assert {kind for notebook in notebooks_to_visit().values() for kind in explorers_in(notebook)} <= set(ACTIONS)
