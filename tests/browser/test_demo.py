"""The page in which teacher and students answer, in Chromium: the same probabilities as in Python, and no network."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kd_helpers import artifacts
from kd_helpers.course.demo import EXAMPLES, course_models, demo
from kd_helpers.export import INT8, OnnxClassifier
from kd_helpers.models import load_tokenizer, model_inputs

# The last is as long as the field allows, and longer than the models read.
TEXTS = (*EXAMPLES, "ok", "I LOVE this!!! @user http://t.co/x", ("so! " * 100).strip())


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A server of files that does not talk."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """The page with the course's models, as `make demo` writes it, behind a server."""
    folder = tmp_path_factory.mktemp("site")
    demo(folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("width", [1200, 390])
def test_every_model_answers_as_in_python(browser, address, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    elsewhere, errors = [], []
    page.on(
        "request", lambda request: request.url.startswith((address, "blob:", "data:")) or elsewhere.append(request.url)
    )
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{address}/demo.html")
    page.wait_for_selector("body[data-ready]", state="attached", timeout=120_000)
    for text in TEXTS:
        page.fill("#text", text)
        page.wait_for_function("text => document.body.dataset.answered === text.trim()", arg=text, timeout=60_000)
        for shown in course_models():
            rows = page.locator(f"[data-model={shown.name}] tr")
            found = [float(rows.nth(index).get_attribute("data-score")) for index in range(rows.count())]
            assert found == pytest.approx(probabilities(shown.graphs, text), abs=1e-2), (shown.name, text)
    assert (errors, elsewhere) == ([], [])
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.screenshot(path=artifacts.artifacts_dir() / "browser" / f"demo-{width}.png", full_page=True)
    page.close()


def probabilities(graphs: Path, text: str) -> list[float]:
    graph, tokenizer = OnnxClassifier(graphs, int8=True), load_tokenizer(str(graphs))
    batch = dict(tokenizer([text.strip()], truncation=True, max_length=128, return_tensors="pt"))
    with torch.inference_mode():
        return graph(**model_inputs(graph, batch)).logits.softmax(dim=-1)[0].tolist()


def test_the_student_is_small(address):
    student = next(shown for shown in course_models() if shown.name == "student")
    assert (student.graphs / INT8).stat().st_size <= 20e6


def test_a_page_that_was_opened_as_a_file_says_what_to_do(browser, tmp_path):
    demo(tmp_path)
    page = browser.new_page()
    page.goto((tmp_path / "demo.html").as_uri())
    assert "python -m http.server" in page.inner_text("#status")
    page.close()
