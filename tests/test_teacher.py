from __future__ import annotations

import pytest
import torch
from support.models import tiny_bert
from torch.testing import assert_close

from kd_helpers import teacher as teacher_module
from kd_helpers.data import training_batches
from kd_helpers.models import freeze, teacher_forward
from kd_helpers.teacher import TeacherLogits, attach, cached_logits


@pytest.fixture
def teacher():
    return freeze(tiny_bert(seed=1))


def count_forward_passes(monkeypatch) -> list[int]:
    """How many texts each batch had that the teacher ran on."""
    batches = []

    def counting(teacher, batch, precision):
        batches.append(len(batch["id"]))
        return teacher_forward(teacher, batch, precision)

    monkeypatch.setattr(teacher_module, "teacher_forward", counting)
    return batches


def test_every_batch_carries_its_own_teacher_logits(own_artifacts, teacher, tokenized, tokenizer):
    teacher_logits = cached_logits(teacher, tokenized, tokenizer, precision=torch.float32)
    batches = training_batches(attach(tokenized, teacher_logits), tokenizer, 16, seed=0)
    for epoch in (0, 1):
        batches.batch_sampler.set_epoch(epoch)
        for batch in batches:
            assert batch["teacher_logits"].dtype == torch.float32
            expected = teacher_forward(teacher, batch, torch.float32)
            assert_close(batch["teacher_logits"], expected, rtol=1e-5, atol=1e-5)


def test_the_teacher_runs_once(own_artifacts, monkeypatch, teacher, tokenized, tokenizer):
    batches = count_forward_passes(monkeypatch)
    first = cached_logits(teacher, tokenized, tokenizer, precision=torch.float32)
    assert sum(batches) == len(tokenized)
    second = cached_logits(teacher, tokenized, tokenizer, precision=torch.float32)
    assert sum(batches) == len(tokenized)
    assert torch.equal(first.logits, second.logits)


def test_another_teacher_or_other_texts_are_computed_anew(own_artifacts, monkeypatch, teacher, tokenized, tokenizer):
    batches = count_forward_passes(monkeypatch)
    one = cached_logits(teacher, tokenized, tokenizer, precision=torch.float32)
    other = cached_logits(freeze(tiny_bert(seed=2)), tokenized, tokenizer, precision=torch.float32)
    cached_logits(teacher, tokenized.select(range(10)), tokenizer, precision=torch.float32)
    assert sum(batches) == 2 * len(tokenized) + 10
    assert not torch.equal(one.logits, other.logits)


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_a_damaged_cache_is_said_and_rebuilt(own_artifacts, teacher, tokenized, tokenizer, damage):
    good = cached_logits(teacher, tokenized, tokenizer, precision=torch.float32)
    file = next(own_artifacts.rglob("logits.safetensors"))
    content = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(content[:-100])
    elif damage == "flip":
        content[-5] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    with pytest.warns(UserWarning, match="damaged; it is built anew"):
        rebuilt = cached_logits(teacher, tokenized, tokenizer, precision=torch.float32)
    assert torch.equal(good.logits, rebuilt.logits)


def test_lookup_is_by_id():
    teacher_logits = TeacherLogits(torch.tensor([30, 10, 20]), torch.tensor([[3.0], [1.0], [2.0]]))
    assert teacher_logits.lookup(torch.tensor([10, 20, 30, 10])).flatten().tolist() == [1.0, 2.0, 3.0, 1.0]
    with pytest.raises(ValueError, match=r"2 of 3 texts have no teacher logits \(the first has id 15\)"):
        teacher_logits.lookup(torch.tensor([10, 15, 99]))


def test_a_teacher_in_train_mode_is_refused(tokenized, tokenizer):
    batch = next(iter(training_batches(tokenized, tokenizer, 4, seed=0)))
    with pytest.raises(ValueError, match="train mode"):
        teacher_forward(tiny_bert().train(), batch, torch.float32)
