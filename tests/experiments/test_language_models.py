"""The studies of chapter 13: what an arm learns from, what is measured, and all of it in small."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from kd_helpers.experiments import language_models
from kd_helpers.experiments.language_models import (
    ARMS,
    BASELINE,
    SIZES,
    Corpus,
    Size,
    Training,
    best_step,
    in_turn,
    language_models_study,
    language_teacher,
    load_texts,
    measure_own,
    sizes_study,
    study_of,
    trained,
    write_own,
)
from kd_helpers.experiments.study import gains, run_arm, run_study
from kd_helpers.losses import DistillationLoss
from kd_helpers.methods.language_models import (
    causal_batches,
    cross_entropy_loss,
    held_out_batches,
    held_out_nats,
    make_causal_model,
    nats_of_texts,
)

CORPUS = Corpus(teacher_texts=64, student_texts=32, held_out=16)
TRAINING = Training(teacher_steps=4, steps=4, every=2, written=6)
TINY = Size(width=16, depth=1, learning_rate=1e-2)


@pytest.fixture(autouse=True)
def small_models(monkeypatch) -> None:
    """Teacher and student of one narrow layer."""
    monkeypatch.setattr(language_models, "TEACHER", TINY)
    monkeypatch.setattr(language_models, "STUDENT", TINY)


@pytest.fixture(scope="module")
def texts():
    return load_texts(CORPUS)


def small_study(corpus=CORPUS, training=TRAINING, *, arms=tuple(ARMS), seeds=(0,)):
    return language_models_study(corpus, training, arms=arms, seeds=seeds)


def test_a_corpus_is_cut_as_it_says(texts):
    assert (len(texts.teacher), len(texts.student), len(texts.held_out)) == (64, 32, 16)
    assert texts.student == texts.teacher[:32]
    assert not {tuple(text) for text in texts.teacher} & {tuple(text) for text in texts.held_out}
    assert len(texts.validation) == 16
    assert {tuple(text) for text in texts.validation}.isdisjoint(map(tuple, [*texts.held_out, *texts.teacher]))
    assert set(texts.floors) == {"validation", "held_out"}
    assert all(0.25 < floor < 0.4 for floor in texts.floors.values())
    assert max(map(len, texts.teacher)) <= CORPUS.positions
    begin, end = texts.tokenizer.bos_token_id, texts.tokenizer.eos_token_id
    assert all(text[0] == begin and text[-1] == end for text in texts.held_out)


def test_texts_are_cut_off():
    short = load_texts(dataclasses.replace(CORPUS, positions=20))
    assert {len(text) for text in short.teacher} == {20}


def test_arms_learn_from_what_they_say(texts, monkeypatch, own_artifacts):
    learned = {}
    real = language_models.causal_batches

    def spy(given, *arguments, **options):
        learned[arm] = given
        return real(given, *arguments, **options)

    study = small_study()
    run_arm(small_study(arms=(BASELINE,)), BASELINE, 0)  # so that the teacher is there
    monkeypatch.setattr(language_models, "causal_batches", spy)
    for arm in ("half_forward", "sequence", "sequence_forward", "sequence_many", "more_texts"):
        run_arm(study, arm, 0)
    assert learned["half_forward"] == texts.student
    assert learned["more_texts"] == texts.teacher
    assert learned["sequence"] == learned["sequence_forward"]
    assert len(learned["sequence"]) == 32
    assert len(learned["sequence_many"]) == 64
    assert not {tuple(t) for t in learned["sequence_many"]} & {tuple(t) for t in texts.teacher}


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_in_small(arm, texts, own_artifacts):
    run = run_arm(small_study(), arm, 0)
    steps = TRAINING.steps * ARMS[arm].recipe.times
    assert [entry["step"] for entry in run["history"]] == list(range(2, steps + 1, 2))
    best = min(run["history"], key=lambda entry: entry["validation"])
    if ARMS[arm].recipe.ending:
        best = run["history"][-1]
    assert run["step"] == best["step"]
    assert run["nats"] == pytest.approx(best["validation"], rel=0.1), "of other texts"
    assert run["excess"] == pytest.approx(run["nats"] - texts.floors["held_out"])
    assert 0 < run["teacher_nats"] < 20
    assert 0 < run["own_nats"] < 8
    assert len(run["teacher_nats_by_quarter"]) == 4
    assert 0 <= run["coherent"] <= run["grammar"] <= 1
    assert len(run["samples"]) == 3
    assert all(isinstance(sample, str) for sample in run["samples"])
    seconds = [entry["seconds"] for entry in run["history"]]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


def test_arms_of_a_seed_start_alike_and_others_do_not(monkeypatch, own_artifacts):
    starts = {}
    real = language_models.make_causal_model

    def spy(shape, *, seed):
        model = real(shape, seed=seed)
        starts.setdefault(arm, []).append(next(model.parameters()).detach().sum().item())
        return model

    study = small_study(seeds=(0, 1))
    language_teacher(load_texts(CORPUS), CORPUS, steps=TRAINING.teacher_steps)
    monkeypatch.setattr(language_models, "make_causal_model", spy)
    for arm, seed in ((BASELINE, 0), ("more_texts", 0), ("forward", 1)):
        run_arm(study, arm, seed)
    first = {name: values[0] for name, values in starts.items()}
    assert first[BASELINE] == first["more_texts"] != first["forward"]


def test_the_last_quarter_is_on_policy(monkeypatch, own_artifacts):
    steps = []
    real = language_models.on_policy_loss_of

    def spy(*arguments, **options):
        loss_of = real(*arguments, **options)

        def noted(batch):
            steps.append(int(batch["step"]))
            return loss_of(batch)

        assert options["share"] == 1.0
        return noted

    monkeypatch.setattr(language_models, "on_policy_loss_of", spy)
    run_arm(small_study(), "on_policy", 0)
    assert steps == [3]


def test_the_last_quarter_of_the_other_is_reverse_kl_on_the_given_texts(monkeypatch, own_artifacts):
    asked = []
    real = language_models.distillation_loss_of

    def spy(student, teacher, *, alpha, beta):
        loss_of = real(student, teacher, alpha=alpha, beta=beta)
        return lambda batch: asked.append((int(batch["step"]), beta)) or loss_of(batch)

    monkeypatch.setattr(language_models, "distillation_loss_of", spy)
    run_arm(small_study(), "forward_reverse", 0)
    assert asked == [(0, 0.0), (1, 0.0), (2, 0.0), (3, 1.0)]


def test_a_model_is_left_as_it_was_when_validation_was_best(texts):
    """With a rate that is far too high after the start, so that later measurements are worse."""
    model = make_causal_model(TINY.shape(CORPUS), seed=0)
    seen, batches = [], causal_batches(texts.student, 8, seed=0)

    def noted():
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"noted": float(len(seen))}

    options = {"steps": 12, "learning_rate": 3.0, "every": 1, "measure": noted}
    history = trained(model, batches, cross_entropy_loss(model), texts, **options)
    assert [entry["noted"] for entry in history] == list(range(1, 13))
    best = best_step(history)
    assert 1 <= best < 12
    assert history[best - 1]["validation"] == min(entry["validation"] for entry in history)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, seen[best - 1][name])
    nats = held_out_nats(model, held_out_batches(texts.validation))
    assert nats == pytest.approx(history[best - 1]["validation"])
    batches = causal_batches(texts.student, 8, seed=0)
    trained(model, batches, cross_entropy_loss(model), texts, **options, keep_best=False)
    assert torch.equal(model.model.norm.weight, seen[-1]["model.norm.weight"]), "as it is in the end"


def test_in_turn():
    def constant(value):
        return lambda batch: DistillationLoss(*[torch.tensor(value)] * 3)

    loss_of = in_turn(constant(1.0), constant(2.0), at=5)
    assert [loss_of({"step": torch.tensor(step)}).total.item() for step in (0, 4, 5, 9)] == [1, 1, 2, 2]


def test_the_teacher_is_found_again_and_depends_on_what_made_it(texts, own_artifacts):
    first = language_teacher(texts, CORPUS, steps=2)
    again = language_teacher(texts, CORPUS, steps=2)
    longer = language_teacher(texts, CORPUS, steps=3)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(first.model.norm.weight, longer.model.norm.weight)
    assert not first.training
    assert not any(p.requires_grad for p in first.parameters())
    assert len(list((own_artifacts / "story_teachers").glob("*/model.safetensors"))) == 2


def test_what_is_said_of_written_texts(texts):
    """Against a plain loop over tokens; and the teacher's own texts have the same nats for both."""
    teacher = make_causal_model(TINY.shape(CORPUS), seed=3).eval()
    model = make_causal_model(TINY.shape(CORPUS), seed=4).eval()
    written = write_own(model, texts, CORPUS, count=5, seed=0)
    said = measure_own(model, teacher, written, texts)
    total, count, quarters = 0.0, 0, [[] for _ in range(4)]
    for text in written:
        log_p = torch.log_softmax(teacher(torch.tensor([text])).logits[0], dim=-1)
        nats = [-log_p[place, text[place + 1]].item() for place in range(len(text) - 1)]
        total, count = total + sum(nats), count + len(nats)
        for place, value in enumerate(nats):
            quarters[4 * place // len(nats)].append(value)
    assert said["teacher_nats"] == pytest.approx(total / count, rel=1e-5)
    assert said["teacher_nats_by_quarter"] == pytest.approx([sum(q) / len(q) for q in quarters], rel=1e-5)
    assert said["own_nats"] == pytest.approx(held_out_nats(model, held_out_batches(written)), rel=1e-5)
    assert measure_own(teacher, teacher, written, texts)["own_nats"] == pytest.approx(said["teacher_nats"])


def test_nats_of_texts_keep_their_order(texts):
    model = make_causal_model(TINY.shape(CORPUS), seed=0)
    mixed = [texts.held_out[0], texts.held_out[1][:7], texts.held_out[2]]
    nats = nats_of_texts(model, mixed)
    assert [len(values) for values in nats] == [len(text) - 1 for text in mixed]
    assert model.training
    (alone,) = nats_of_texts(model, mixed[1:2])
    assert nats[1] == pytest.approx(alone, rel=1e-5)


def test_a_whole_study_with_its_teacher(own_artifacts, monkeypatch):
    monkeypatch.setattr(language_models, "language_models_study", functools.partial(small_study, seeds=(0, 1)))
    result = study_of(CORPUS, TRAINING, arms=(BASELINE, "forward"))
    assert [(run["arm"], run["seed"]) for run in result["runs"]] == [
        (arm, seed) for seed in (0, 1) for arm in (BASELINE, "forward")
    ]
    assert set(gains(result, "nats", over=BASELINE).columns) == {"gain", "low", "high"}
    assert result["teacher"]["own_nats"] == pytest.approx(result["teacher"]["teacher_nats"])
    assert result["teacher"]["parameters"] == result["teacher"]["student_parameters"]
    assert result["floors"] == load_texts(CORPUS).floors
    assert result["teacher"]["excess"] == pytest.approx(result["teacher"]["nats"] - result["floors"]["held_out"])


def test_sizes_in_small(own_artifacts):
    study = sizes_study(CORPUS, steps=4, every=2, written=4)
    study = dataclasses.replace(study, arms={"tiny": dataclasses.replace(SIZES["32 × 1"], recipe=TINY)}, seeds=(0,))
    (run,) = run_study(study)["runs"]
    assert [entry["step"] for entry in run["history"]] == [2, 4]
    assert all({"validation", "grammar", "coherent"} <= set(entry) for entry in run["history"])
    assert run["parameters"] == 512 * 16 + 4 * 16 * 16 + 3 * 16 * 48 + 3 * 16
    assert {"grammar", "names", "plot", "coherent"} <= set(run)
