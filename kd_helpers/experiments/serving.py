"""Chapter 08: how fast a model answers, in torch and as an ONNX graph, on this machine.

Teacher and student are timed in the same ways, in turn, round after round, so that a machine that slows down slows all
of them. The time for tokenising is included, as it is when a model serves.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd_helpers import artifacts
from kd_helpers.config import DistillConfig, expanded
from kd_helpers.experiments import RESULTS
from kd_helpers.experiments.study import made_with
from kd_helpers.export import OnnxClassifier, cached_export
from kd_helpers.metrics import fidelity
from kd_helpers.models import model_inputs
from kd_helpers.resolve import resolve
from kd_helpers.runs import distill, load_run
from kd_helpers.runtime import autocast, processor
from kd_helpers.teacher import fine_tuned_teacher

WAYS = ("torch", "bfloat16", "ONNX", "int8")
# The run whose student is timed when nobody names one: that of chapter 05.
COURSE = DistillConfig(epochs=3)
ALONE, TOGETHER, BATCH = 200, 1024, 32  # texts that come one by one; texts that come in batches; of that size
ROUNDS = 3


class Served(NamedTuple):
    """A model that answers texts in one of `WAYS`.

    Attributes:
        model: of torch, or an `OnnxClassifier`.
        tokenizer: of it.
        max_length: tokens of a text that are kept.
        precision: of torch's matrix products.
        megabytes: of its file.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    precision: torch.dtype
    megabytes: float

    def tokens(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """What the model reads of some texts."""
        options = {"padding": True, "truncation": True, "max_length": self.max_length}
        return model_inputs(self.model, dict(self.tokenizer(list(texts), return_tensors="pt", **options)))

    def answer(self, texts: Sequence[str]) -> torch.Tensor:
        """The logits `[N, C]` of N texts, tokenised and read together."""
        with torch.inference_mode(), autocast(self.model.device, self.precision):
            return self.model(**self.tokens(texts)).logits.float().cpu()  # .cpu() waits for an asynchronous device


def serving_ways(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, graphs: Path, *, max_length: int, threads: int
) -> dict[str, Served]:
    """A model, ready to answer in each of `WAYS`.

    Args:
        model: in torch.
        tokenizer: of it.
        graphs: the folder to which it was exported, with weights of eight bits.
        max_length: tokens of a text that are kept.
        threads: of onnxruntime; for torch see `torch_threads`.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) / 1e6
    found = {
        way: Served(model.eval(), tokenizer, max_length, precision, size)
        for way, precision in (("torch", torch.float32), ("bfloat16", torch.bfloat16))
    }
    for way, int8 in (("ONNX", False), ("int8", True)):
        graph = OnnxClassifier(graphs, int8=int8, threads=threads)
        found[way] = Served(graph, tokenizer, max_length, torch.float32, graph.megabytes)
    return found


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch compute with so many threads within."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def answer_times(served: Served, texts: Sequence[str]) -> dict[str, float]:
    """What a model takes to answer, tokenising included.

    Returns:
        Of texts that come one by one, the first `ALONE`: `p50_ms` and `p95_ms`, and `tokenising_ms`, the part of it
        that is tokenising (median). Of batches of `BATCH`: `texts_per_second`.
    """
    served.answer(texts[:BATCH])  # warms up
    whole, tokenising = [], []
    for text in texts[:ALONE]:
        start = time.perf_counter()
        served.tokens([text])
        tokenised = time.perf_counter()
        served.answer([text])
        whole.append(1000 * (time.perf_counter() - tokenised))
        tokenising.append(1000 * (tokenised - start))
    start = time.perf_counter()
    for first in range(0, len(texts), BATCH):
        served.answer(texts[first : first + BATCH])
    p50, p95 = np.percentile(whole, [50, 95])
    return {
        "p50_ms": float(p50),
        "p95_ms": float(p95),
        "tokenising_ms": float(np.median(tokenising)),
        "texts_per_second": len(texts) / (time.perf_counter() - start),
    }


def serving_table(
    models: Mapping[str, tuple[PreTrainedModel, PreTrainedTokenizerBase, Path]],
    texts: Sequence[str],
    *,
    max_length: int,
    threads: Sequence[int],
    rounds: int = ROUNDS,
) -> pd.DataFrame:
    """Let all models answer the same texts in all ways.

    Args:
        models: by name the model in torch, its tokenizer, and the folder to which it was exported.
        texts: to answer; a thousand or so.
        max_length: tokens of a text that are kept.
        threads: for example 1 and the number of cores.
        rounds: how often the ways take turns; times are medians over them.

    Returns:
        A row for each of `model`, `way` and `threads`: what `answer_times` measures, `megabytes`, and `fidelity`, the
        share of texts for which the way predicts what torch predicts in float32.
    """
    rows = []
    turns = tqdm(total=rounds * len(threads) * len(models) * len(WAYS), desc="Serving", unit="turn", leave=False)
    for count in threads:
        with torch_threads(count):
            ways = {
                (name, way): served
                for name, (model, tokenizer, graphs) in models.items()
                for way, served in serving_ways(model, tokenizer, graphs, max_length=max_length, threads=count).items()
            }
            for _ in range(rounds):
                for (name, way), served in ways.items():
                    turns.set_postfix_str(f"{name}, {way}")
                    rows.append({"model": name, "way": way, "threads": count, **answer_times(served, texts)})
                    turns.update()
            answers = {key: served.answer(texts[: 8 * BATCH]) for key, served in ways.items()}
    turns.close()
    table = pd.DataFrame(rows).groupby(["model", "way", "threads"], sort=False).median()
    table["megabytes"] = [ways[name, way].megabytes for name, way, _ in table.index]
    table["fidelity"] = [
        fidelity(answers[name, way], answers[name, "torch"])["fidelity"] for name, way, _ in table.index
    ]
    return table


def cores() -> int:
    """The cores that this process may use; a container may have fewer than its machine."""
    return joblib.cpu_count()


def run(source: str = "") -> dict[str, Any]:
    """Time a run's student and its teacher.

    Args:
        source: the folder of a run of `distill`; when empty, the course's own pair, which is made if it is not there.

    Returns:
        JSON-ready: `made_with`, `config` of the run, and the `rows` of `serving_table`.

    Raises:
        FileNotFoundError, ValueError: the folder holds no run; or its data, whose texts are answered, is not found.
    """
    result = load_run(expanded(source)) if source else distill(COURSE)
    setup = resolve(result.config)
    teacher, length = fine_tuned_teacher(setup).cpu(), result.config.max_length
    models = {
        name: (model, tokenizer, cached_export(model, tokenizer, max_length=length))
        for name, model, tokenizer in (
            ("teacher", teacher, setup.tokenizers.teacher),
            ("student", result.student.cpu(), result.tokenizer),
        )
    }
    texts = setup.data.test["text"][:TOGETHER]
    table = serving_table(models, texts, max_length=length, threads=sorted({1, cores()}))
    cpu = torch.device("cpu")
    return {
        "made_with": made_with("kd_helpers.experiments.serving") | {"processor": processor(cpu)},
        "config": result.config.to_dict(),
        "rows": table.reset_index().to_dict("records"),
    }


def stored_serving() -> dict[str, Any]:
    """The result that comes with the course, made by `make benchmark`."""
    return artifacts.load_json(RESULTS / "serving.json")


def times(result: Mapping[str, Any]) -> pd.DataFrame:
    """The rows of a result as `serving_table` returned them."""
    return pd.DataFrame(result["rows"]).set_index(["model", "way", "threads"])


def report(result: Mapping[str, Any]) -> str:
    """The result as plain text."""
    made, table = result["made_with"], times(result)
    best = table.xs(table.index.get_level_values("threads").max(), level="threads")
    student = best.loc[("student", "int8")]
    lines = [
        f"the student in eight bits answers {student['texts_per_second'] / row['texts_per_second']:.1f} times as many "
        f"texts a second as the {name} in {way}, and one text in {student['p50_ms'] / row['p50_ms']:.2f} of its time"
        for (name, way), row in best.iterrows()
        if (name, way) != ("student", "int8")
    ]
    return f"{made['processor']}, torch {made['torch']}\n\n{table.round(3).to_string()}\n\n" + "\n".join(lines) + "\n"
