"""Checkpoints as people have them: half saved, wrapped, edited, adapted. The right model, or one sentence.

Everything is tried with tiny models of the real shapes; the sentences are those that a reader meets.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import safetensors.torch
import torch
from support import hub_cache
from support.architectures import BERT_TOKENS, tiny, wordpiece
from support.trainer import arguments, collator
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    BertTokenizer,
    PreTrainedModel,
    pipeline,
)

from kd_helpers import adapters, models, train
from kd_helpers.config import PACKAGED_MODEL, DistillConfig
from kd_helpers.data import evaluation_batches, tokenize
from kd_helpers.loop import classifier_loss
from kd_helpers.metrics import predict
from kd_helpers.models import (
    accepted_inputs,
    freeze,
    load_classifier,
    load_tokenizer,
    match_tokenizer,
    model_inputs,
    reading,
    save_model,
    teacher_forward,
    unwrapped,
    warn_if_swapped,
)
from kd_helpers.pretrained import some
from kd_helpers.resolve import resolve
from kd_helpers.runs import distill
from kd_helpers.teacher import fine_tuned_teacher, load_teacher_logits
from kd_helpers.trainer import DistillationTrainer

pytestmark = pytest.mark.filterwarnings("ignore:the teacher is not shown", "ignore:the student .* has")

NAMES = ("negative", "neutral", "positive")
LONGEST_SENTENCE = 350


def saved(folder: Path, kind: str = "bert", labels: tuple[str, ...] = NAMES, seed: int = 0, **changes: object) -> Path:
    """A whole checkpoint in a folder."""
    save_model(folder, *tiny(kind, labels, seed, **changes))
    return folder


def edit(path: Path, **changes: object) -> None:
    """Change entries of a JSON file; None removes one."""
    entries = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in entries.items() if value is not None}))


def rename(folder: Path, new_name: Callable[[str], str | None]) -> None:
    """Give the weights in a folder other names; None drops one."""
    file = folder / "model.safetensors"
    weights = {new_name(name): tensor.clone() for name, tensor in safetensors.torch.load_file(file).items()}
    weights.pop(None, None)
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})


def sentence_of(call: Callable[[], object], error: type[Exception] = ValueError) -> str:
    """What a refusal says; it is one line that a reader can take in."""
    with pytest.raises(error) as caught:
        call()
    sentence = str(caught.value)
    assert "\n" not in sentence
    as_read = re.sub(rf"{re.escape(tempfile.gettempdir())}/[^'\" ]*/", "", sentence)  # the tests' folders are deep
    assert len(as_read) <= LONGEST_SENTENCE, as_read
    assert sentence.endswith(".")
    return sentence


def small(**changes: object) -> DistillConfig:
    usual = {"train_size": 64, "max_steps": 2, "batch_size": 16, "max_length": 24, "teacher_epochs": 0}
    return DistillConfig(**usual | {"device": "cpu", "precision": "float32"} | changes)


# 1: the files of the tokenizer

MADE_UP = ("bert", "roberta", "xlm-roberta", "deberta-v3", "electra", "distilbert", "mpnet", "gpt2", "qwen2", "t5")
NOT_MADE_UP = ("modernbert", "llama")  # transformers can't load anything, and says so in its own way


@pytest.mark.parametrize("kind", [*MADE_UP, *NOT_MADE_UP])
@pytest.mark.parametrize("kept", [(), ("tokenizer_config.json",)], ids=["nothing", "tokenizer_config.json"])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, kind, kept):
    folder = saved(tmp_path / "checkpoint-500", kind)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if file not in kept:
            (folder / file).unlink()
    sentence = sentence_of(lambda: load_tokenizer(str(folder)))
    assert "checkpoint-500' has no tokenizer (tokenizer.json" in sentence
    assert "save_pretrained(" in sentence


def test_the_missing_files_of_a_tokenizer_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = saved(Path("checkpoint-500"), "roberta")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    assert sentence_of(lambda: load_tokenizer("checkpoint-500")) == (
        "'checkpoint-500' has no tokenizer (tokenizer.json, or vocab.json and merges.txt for a RobertaTokenizer, is "
        "missing); save the one that belongs to the model beside it: "
        "AutoTokenizer.from_pretrained(BASE_MODEL).save_pretrained('checkpoint-500')."
    )
    (folder / "vocab.txt").write_text("\n".join(vocabulary))  # a file of another kind is no help
    assert "vocab.json and merges.txt" in sentence_of(lambda: load_tokenizer("checkpoint-500"))
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    sentence = sentence_of(lambda: load_tokenizer("checkpoint-500"))
    assert "'checkpoint-500' has no tokenizer (tokenizer.json, or merges.txt, is missing); save" in sentence


def test_a_run_with_such_a_folder_ends_at_once(tmp_path, own_artifacts, small_data, capsys):
    folder = saved(tmp_path / "checkpoint-500")
    (folder / "tokenizer.json").unlink()
    for role in ("teacher_checkpoint", "student_checkpoint"):
        assert "has no tokenizer" in sentence_of(
            lambda role=role: distill(small(**{role: str(folder)}), data=small_data)
        )
    with pytest.raises(SystemExit) as ended:
        train.main(["--student_checkpoint", str(folder), "--output_dir", str(tmp_path / "out"), "--use_cpu"])
    assert ended.value.code == 2
    assert "has no tokenizer" in capsys.readouterr().err


def test_every_form_of_a_vocabulary_is_a_tokenizer(tmp_path):
    text = "What a good day"
    bert = saved(tmp_path / "bert")
    wanted = load_tokenizer(str(bert))(text)["input_ids"]
    vocabulary = json.loads((bert / "tokenizer.json").read_text())["model"]["vocab"]
    (bert / "tokenizer_config.json").unlink()
    assert load_tokenizer(str(bert))(text)["input_ids"] == wanted, "tokenizer.json alone"
    (bert / "tokenizer.json").unlink()
    (bert / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    assert load_tokenizer(str(bert))(text)["input_ids"] == wanted, "vocab.txt alone"

    roberta = saved(tmp_path / "roberta", "roberta")
    wanted = load_tokenizer(str(roberta))(text)["input_ids"]
    stored = json.loads((roberta / "tokenizer.json").read_text())["model"]
    (roberta / "tokenizer.json").unlink()
    (roberta / "vocab.json").write_text(json.dumps(stored["vocab"]))
    (roberta / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in stored["merges"]))
    assert load_tokenizer(str(roberta))(text)["input_ids"] == wanted, "vocab.json and merges.txt"


def test_a_tokenizer_that_is_built_otherwise_than_its_file_says_is_refused(tmp_path):
    cased = saved(tmp_path / "cased")
    vocabulary = json.loads((cased / "tokenizer.json").read_text())["model"]["vocab"]
    BertTokenizer(vocab=vocabulary, do_lower_case=False).save_pretrained(cased)
    assert load_tokenizer(str(cased))("Good")["input_ids"][1] == vocabulary["[UNK]"]
    (cased / "tokenizer_config.json").unlink()  # and BERT's are taken to be in lower case
    assert "tokenizer_config.json" in sentence_of(lambda: load_tokenizer(str(cased)))

    words = saved(tmp_path / "roberta", "roberta")
    wordpiece("BertTokenizer", BERT_TOKENS).save_pretrained(words)
    assert (
        load_tokenizer(str(words))("good day")["input_ids"]
        == load_tokenizer(str(cased.parent / "roberta"))("good day").input_ids
    )
    (words / "tokenizer_config.json").unlink()  # and RoBERTa's cut by another algorithm
    assert "cuts texts in another way than the RobertaTokenizer" in sentence_of(lambda: load_tokenizer(str(words)))


@pytest.mark.parametrize("content", ["", '{"version": "1.0", "trunc', "version https://git-lfs.github.com/spec/v1\n"])
def test_a_damaged_tokenizer_is_one_sentence(tmp_path, content):
    folder = saved(tmp_path / "model")
    (folder / "tokenizer.json").write_text(content)
    assert str(folder) in sentence_of(lambda: load_tokenizer(str(folder)))


def test_a_sentencepiece_model_says_what_it_needs(tmp_path):
    if importlib.util.find_spec("sentencepiece"):
        pytest.skip("it is installed")
    folder = saved(tmp_path / "model", "t5")
    (folder / "tokenizer.json").unlink()
    (folder / "spiece.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    assert "pip install sentencepiece protobuf" in sentence_of(lambda: load_tokenizer(str(folder)))


def test_a_tokenizer_that_knows_none_of_the_words_is_reported(tmp_path, own_artifacts, small_data):
    teacher, student = saved(tmp_path / "teacher"), saved(tmp_path / "student", seed=1)
    hub_cache.word_tokenizer(["天气", "很好"]).save_pretrained(student)
    config = small(teacher_checkpoint=str(teacher), student_checkpoint=str(student))
    with pytest.warns(UserWarning, match=r"\d+% of the tokens of the training texts are unknown to the tokenizer of"):
        distill(config, data=small_data)


# 2: the weights

PREFIXES = ("_orig_mod.", "module.", "base_model.model.", "model.", "student.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_weights_under_a_prefix_are_refused_and_the_remedy_works(tmp_path, prefix):
    folder = saved(tmp_path / "model")
    wanted = safetensors.torch.load_file(folder / "model.safetensors")
    rename(folder, lambda name: prefix + name)
    sentence = sentence_of(lambda: load_classifier(str(folder), NAMES, seed=0))
    assert f"begin with {prefix!r}" in sentence
    remedy = re.search(r"rename them with safetensors\.torch: (save_file\(.*\))\.$", sentence)[1]
    eval(remedy, vars(safetensors.torch) | {"FILE": folder / "model.safetensors"})
    repaired = load_classifier(str(folder), NAMES, seed=0).state_dict()
    assert all(torch.equal(repaired[name], value) for name, value in wanted.items())


def test_an_encoder_of_other_names_is_refused_with_what_is_missing_and_what_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rename(saved(Path("model")), lambda name: name.replace("bert.", "backbone.net."))
    assert sentence_of(lambda: load_classifier("model", NAMES, seed=0)) == (
        "'model' lacks 37 of the 41 weights of a BertForSequenceClassification (bert.embeddings.LayerNorm.bias, "
        "bert.embeddings.LayerNorm.weight and 35 more); what it has instead: backbone.net.embeddings.LayerNorm.bias, "
        "backbone.net.embeddings.LayerNorm.weight and 37 more. Take a checkpoint that is whole and of the kind that "
        "config.json names."
    )


def test_a_single_weight_that_is_missing_is_named(tmp_path):
    folder = saved(tmp_path / "model")
    rename(folder, lambda name: None if name == "bert.encoder.layer.1.output.dense.weight" else name)
    sentence = sentence_of(lambda: load_classifier(str(folder), NAMES, seed=0))
    assert "lacks 1 of the 41 weights" in sentence
    assert "(bert.encoder.layer.1.output.dense.weight)" in sentence


@pytest.mark.parametrize("lost", ["classifier.weight", "classifier", "pooler"])
def test_a_head_that_was_promised_and_is_missing_is_refused(tmp_path, lost):
    folder = saved(tmp_path / "model")
    rename(folder, lambda name: None if lost in name else name)
    sentence = sentence_of(lambda: load_classifier(str(folder), NAMES, seed=0))
    assert "should have a trained classification head, but lacks" in sentence
    assert lost in sentence
    if lost == "classifier":  # the remedy
        edit(folder / "config.json", architectures=None)
        assert load_classifier(str(folder), NAMES, seed=0).num_labels == 3


@pytest.mark.parametrize("prefix", ["bert.", ""], ids=["of the classifier", "of the bare encoder"])
def test_more_layers_than_the_configuration_says_are_refused(tmp_path, prefix):
    folder = saved(tmp_path / "model")
    rename(folder, lambda name: name.replace("bert.", prefix))
    edit(folder / "config.json", num_hidden_layers=1)
    sentence = sentence_of(lambda: load_classifier(str(folder), NAMES, seed=0))
    assert "has more layers than its config.json says" in sentence
    assert "encoder.layer.1.attention.output.LayerNorm.bias" in sentence
    assert "and 14 more" in sentence
    edit(folder / "config.json", num_hidden_layers=3)
    assert "lacks 16 of the 57 weights" in sentence_of(lambda: load_classifier(str(folder), NAMES, seed=0))


def test_a_configuration_of_other_shapes_is_refused(tmp_path):
    folder = saved(tmp_path / "model")
    rows = tiny("bert")[0].config.vocab_size
    edit(folder / "config.json", vocab_size=99)
    sentence = sentence_of(lambda: load_classifier(str(folder), NAMES, seed=0))
    assert f"bert.embeddings.word_embeddings.weight has the shape ({rows}, 16), it says (99, 16)" in sentence


def test_a_head_with_other_outputs_than_labels_is_refused(tmp_path):
    folder = saved(tmp_path / "model", labels=("bad", "good"))
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}
    edit(folder / "config.json", **names)
    sentence = sentence_of(lambda: load_classifier(str(folder), NAMES, seed=0))
    assert "names 3 labels, but classifier.bias has 2 outputs; correct id2label" in sentence


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", None])
def test_weights_that_are_damaged_are_one_sentence(tmp_path, content):
    folder = saved(tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    assert "are damaged, or no weights at all" in sentence_of(lambda: load_classifier(str(folder), NAMES, seed=0))


def test_a_folder_that_is_no_model_is_one_sentence(tmp_path):
    folder = saved(tmp_path / "model")

    def refusal(error: type[Exception] = ValueError) -> str:
        return sentence_of(lambda: load_classifier(str(folder), NAMES, seed=0), error)

    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "no model.safetensors, or not all parts of it (other weights: pytorch_model.bin)" in refusal(
        FileNotFoundError
    )
    index = {"metadata": {}, "weight_map": {"classifier.bias": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "not all parts of it" in refusal(FileNotFoundError)
    for model_type, said in {
        "whisper": "no text classifier of the kind",
        "homemade": "does not know the kind",
    }.items():
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        assert said in refusal()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": "16"}))
    assert "config.json of" in refusal()
    (folder / "config.json").write_text('{"model_type":')
    assert "is no valid JSON" in refusal(FileNotFoundError)
    (folder / "config.json").unlink()
    assert "has no config.json, so it holds no model" in refusal()


def test_quantised_weights_say_what_they_need(tmp_path):
    if importlib.util.find_spec("bitsandbytes"):
        pytest.skip("it is installed")
    folder = saved(tmp_path / "model")
    edit(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    sentence = sentence_of(lambda: load_classifier(str(folder), NAMES, seed=0))
    assert "needs a Python package that is not installed" in sentence
    assert "bitsandbytes" in sentence


OTHER_HEADS = (AutoModelForMaskedLM, AutoModelForTokenClassification, AutoModelForQuestionAnswering)
ENCODERS = [
    *((kind, head) for kind in ("bert", "roberta", "distilbert", "deberta-v3", "albert") for head in OTHER_HEADS),
    *((kind, AutoModel) for kind in ("bert", "roberta", "electra", "xlnet", "mobilebert", "gpt2", "llama", "bart")),
    *((kind, AutoModelForPreTraining) for kind in ("bert", "electra", "funnel", "albert", "t5", "gpt2")),
    *((kind, AutoModelForSeq2SeqLM) for kind in ("bart", "t5")),
    *(("modernbert", head) for head in OTHER_HEADS),
]


@pytest.mark.parametrize(("kind", "head"), ENCODERS, ids=lambda value: getattr(value, "__name__", value))
def test_encoders_with_any_head_or_none_are_loaded_with_a_fresh_one(tmp_path, kind, head):
    """Whatever head it has, the encoder is the checkpoint's, and the fresh head follows from the seed."""
    classifier, tokenizer = tiny(kind, ("O", "person", "place"))
    if head is AutoModelForQuestionAnswering:
        classifier.config.num_labels = 2  # where an answer begins and ends
    with torch.random.fork_rng():
        torch.manual_seed(7)
        checkpoint = head.from_config(classifier.config)
    save_model(tmp_path / "model", checkpoint, tokenizer)
    one, same, other = (load_classifier(str(tmp_path / "model"), NAMES, seed=seed) for seed in (1, 1, 2))
    name, _ = models.output_layer(one)
    weights = [model.state_dict()[f"{name}.weight"] for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert f"{name}.weight" not in checkpoint.state_dict() or not torch.equal(
        weights[0], checkpoint.state_dict()[f"{name}.weight"]
    ), "the head of another task is not this one's"
    stored = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    encoder = one.base_model.state_dict()
    prefix = f"{one.base_model_prefix}."
    shared = [key for key in stored if key.removeprefix(prefix) in encoder and "pooler" not in key]
    assert len(shared) >= 10
    assert all(torch.equal(encoder[key.removeprefix(prefix)], stored[key]) for key in shared)


def test_the_usual_oddities_of_old_checkpoints_are_loaded(tmp_path):
    """Buffers that are saved no longer, LayerNorm's old names, and weights in half precision."""
    folder = saved(tmp_path / "model")
    wanted = load_classifier(str(folder), NAMES, seed=0).state_dict()
    file = folder / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for name, tensor in weights.items():
        for new, former in old.items():
            name = name.replace(new, former)
        renamed[name] = tensor.half()
    renamed["bert.embeddings.position_ids"] = torch.arange(128)[None]
    safetensors.torch.save_file(renamed, file, metadata={"format": "pt"})
    loaded = load_classifier(str(folder), NAMES, seed=0).state_dict()
    assert all(torch.equal(loaded[name], value.half().float()) for name, value in wanted.items())


def test_the_packaged_model_is_loaded_whole():
    model = load_classifier(PACKAGED_MODEL, NAMES, seed=0)
    stored = safetensors.torch.load_file(Path(models.checkpoint_path(PACKAGED_MODEL)) / "model.safetensors")
    encoder = model.base_model.state_dict()
    assert all(torch.equal(encoder[name], value) for name, value in stored.items() if "position_ids" not in name)


def test_some_names_and_how_many_more():
    assert some(["a", "b"]) == "a, b"
    assert some([*"abcdefg"]) == "a, b and 5 more"


# 4: a folder that was edited


def swap_names(folder: Path) -> None:
    edit(folder / "config.json", id2label={0: "positive", 1: "neutral", 2: "negative"}, label2id=None)


def retrain(folder: Path) -> None:
    tiny("bert", NAMES, seed=9)[0].save_pretrained(folder)


def other_vocabulary(folder: Path) -> None:
    stored = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = stored["model"]["vocab"]
    vocabulary["a"], vocabulary["the"] = vocabulary["the"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(stored))


EDITS = {
    "activation": lambda folder: edit(folder / "config.json", hidden_act="relu"),
    "LayerNorm": lambda folder: edit(folder / "config.json", layer_norm_eps=0.5),
    "names": swap_names,
    "weights": retrain,
    "vocabulary": other_vocabulary,
    "case": lambda folder: edit(folder / "tokenizer_config.json", do_lower_case=False),
}


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("change", EDITS)
def test_an_edited_folder_is_another_run(tmp_path, own_artifacts, small_data, role, change):
    folders = {name: saved(tmp_path / name, seed=seed) for seed, name in enumerate(("teacher", "student"))}
    config = small(**{f"{name}_checkpoint": str(folder) for name, folder in folders.items()})
    before = distill(config, data=small_data)
    assert distill(config, data=small_data).folder == before.folder, "found again as long as nothing changes"
    logits = load_teacher_logits(resolve(config, small_data), "train").logits
    EDITS[change](folders[role])
    after = distill(config, data=small_data)
    assert after.folder != before.folder
    now = load_teacher_logits(resolve(config, small_data), "train").logits
    assert torch.equal(now, logits) == (role == "student")
    if change == "names" and role == "teacher":
        assert_close(now, logits[:, [2, 1, 0]])


@pytest.mark.parametrize("change", ["activation", "weights", "vocabulary"])
def test_a_student_of_the_teachers_layers_follows_the_teachers_folder(tmp_path, own_artifacts, small_data, change):
    """Without a teacher signal nothing else would tell."""
    folder = saved(tmp_path / "teacher", num_hidden_layers=6)
    config = small(teacher_checkpoint=str(folder), alpha=0.0)
    before = distill(config, data=small_data)
    EDITS[change](folder)
    if change == "weights":
        tiny("bert", NAMES, seed=9, num_hidden_layers=6)[0].save_pretrained(folder)
    assert distill(config, data=small_data).folder != before.folder


def test_a_teacher_is_fine_tuned_anew_when_its_folder_is_edited(tmp_path, own_artifacts, small_data):
    folder = saved(tmp_path / "teacher")
    config = small(teacher_checkpoint=str(folder), student_checkpoint=str(folder), teacher_epochs=1)
    setup = resolve(config, dataclasses.replace(small_data, teacher_train=small_data.train))
    fine_tuned_teacher(setup)
    EDITS["activation"](folder)
    assert fine_tuned_teacher(setup).config.hidden_act == "relu"
    assert len(list((own_artifacts / "teachers").glob("[0-9a-f]*"))) == 2


# 5: whose head it is


@pytest.mark.parametrize("architectures", [None, [], ["BertModel"], ["SentimentBert"]])
def test_a_trained_head_is_known_by_its_weights(tmp_path, architectures):
    folder = saved(tmp_path / "model", labels=("positive", "negative", "neutral"))
    wanted = load_classifier(str(folder), NAMES, seed=0).state_dict()
    edit(folder / "config.json", architectures=architectures)
    loaded = load_classifier(str(folder), NAMES, seed=0).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in wanted.items())
    stored = safetensors.torch.load_file(folder / "model.safetensors")["classifier.weight"]
    assert torch.equal(loaded["classifier.weight"], stored[[1, 2, 0]]), "negative, neutral, positive"


def test_bad_and_good_do_not_swap(tmp_path, own_artifacts):
    """A checkpoint in the order good, bad; the data has bad, good."""
    folder = saved(tmp_path / "model", labels=("good", "bad"))
    trained, tokenizer = tiny("bert", ("good", "bad"))
    edit(folder / "config.json", architectures=None)
    loaded = freeze(load_classifier(str(folder), ("bad", "good"), seed=0))
    ids = torch.tensor([tokenizer("what a good day")["input_ids"]])
    with torch.no_grad():
        assert_close(loaded(ids).logits, trained(ids).logits.flip(-1))
    save_model(tmp_path / "again", loaded, tokenizer)
    texts = ["what a good day", "so bad"]
    answers = [pipeline("text-classification", str(path), device="cpu")(texts) for path in (folder, tmp_path / "again")]
    for one, other in zip(*answers, strict=True):
        assert one["label"] == other["label"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-6)


def test_a_head_without_names_is_refused_however_it_is_called(tmp_path):
    folder = saved(tmp_path / "model", labels=("LABEL_0", "LABEL_1", "LABEL_2"))
    edit(folder / "config.json", architectures=None, id2label=None, label2id=None, num_labels=3)
    sentence = sentence_of(lambda: load_classifier(str(folder), NAMES, seed=0))
    assert "was trained for the labels LABEL_0, LABEL_1, LABEL_2, the data has negative, neutral, positive" in sentence


# 7: what a head was trained for


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_a_student_says_that_a_text_has_one_label(tmp_path, own_artifacts, small_data, problem_type):
    teacher, student = saved(tmp_path / "teacher"), saved(tmp_path / "student", seed=1)
    edit(student / "config.json", problem_type=problem_type)
    config = small(teacher_checkpoint=str(teacher), student_checkpoint=str(student))
    run = distill(config, data=small_data)
    stored = json.loads((run.folder / "student" / "config.json").read_text())
    assert stored["problem_type"] == "single_label_classification"
    classify = pipeline("text-classification", str(run.folder / "student"), top_k=None, device="cpu")
    for text in small_data.test["text"][:5]:
        assert sum(answer["score"] for answer in classify([text])[0]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_a_teacher_for_several_labels_teaches_only_once_it_is_fine_tuned(
    tmp_path, own_artifacts, small_data, problem_type
):
    folder = saved(tmp_path / "teacher", num_hidden_layers=6)
    edit(folder / "config.json", problem_type=problem_type)
    config = small(teacher_checkpoint=str(folder))
    sentence = sentence_of(lambda: distill(config, data=small_data))
    assert f"was trained for {problem_type}, so a softmax of its logits means nothing" in sentence
    data = dataclasses.replace(small_data, teacher_train=small_data.train)
    run = distill(config.replace(teacher_epochs=1), data=data)
    assert run.student.config.problem_type == "single_label_classification"


def test_a_problem_type_that_does_not_exist_teaches_nothing(tmp_path, own_artifacts, small_data):
    folder = saved(tmp_path / "model")
    edit(folder / "config.json", problem_type="sentiment")
    assert load_classifier(str(folder), NAMES, seed=0).config.problem_type == "single_label_classification"
    config = small(teacher_checkpoint=str(folder), student_checkpoint=str(saved(tmp_path / "student")))
    assert "was trained for sentiment, so" in sentence_of(lambda: distill(config, data=small_data))


# 11: what pads


def odd_padding() -> tuple[PreTrainedModel, BertTokenizer]:
    """A BERT whose table says that token 0 pads, and a tokenizer that pads with another."""
    tokenizer = wordpiece("BertTokenizer", ("[UNK]", "[CLS]", "[SEP]", "[MASK]", "!", "[PAD]"))
    assert tokenizer.pad_token_id == 5
    model, _ = tiny("bert", NAMES, vocab_size=len(tokenizer), pad_token_id=0)
    return model, tokenizer


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("kind", ["bert", "roberta", "xlnet", "funnel", "gpt2"])
def test_whatever_pads_is_part_of_lean_training(tmp_path, own_artifacts, small_data, kind, lean):
    model, tokenizer = odd_padding() if kind == "bert" else tiny(kind, NAMES)
    save_model(tmp_path / "student", model, tokenizer)
    config = small(
        teacher_checkpoint=str(saved(tmp_path / "teacher")), student_checkpoint=str(tmp_path / "student"), lean=lean
    )
    lengths = tokenize(small_data.train, load_tokenizer(str(tmp_path / "student")), 24)["length"][:]
    assert len(set(lengths)) > 1, "some texts are padded"
    losses = distill(config, data=small_data).history[-1]["losses"]["total"]
    assert all(torch.isfinite(torch.tensor(losses)))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "mistral", "bloom", "opt", "xlnet"])
def test_padding_changes_no_logit_of_a_model_that_reads_the_last_token(tmp_path, kind, small_data):
    folder = saved(tmp_path / "model", kind)
    tokenizer = load_tokenizer(str(folder))
    model = load_classifier(str(folder), NAMES, seed=0).eval()
    match_tokenizer(model, tokenizer, 24, kind)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    texts = tokenize(small_data.test.select(range(8)), tokenizer, 24)
    (batch,) = evaluation_batches(texts, tokenizer)
    with torch.no_grad():
        together = model(**model_inputs(model, batch)).logits
        for row, index in enumerate(batch["id"].tolist()):
            ids = texts["input_ids"][texts["id"][:].index(index)]
            assert_close(model(torch.tensor([ids])).logits[0], together[row], rtol=1e-4, atol=1e-5)


def test_a_decoder_learns_what_its_tokenizer_pads_with(tmp_path):
    """GPT-2 whose configuration says that the end token pads, with a tokenizer that got a token of its own for it."""
    model, tokenizer = tiny("gpt2", NAMES)
    model.config.pad_token_id = tokenizer.eos_token_id
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model.resize_token_embeddings(len(tokenizer))
    match_tokenizer(model, tokenizer, 24, "gpt2")
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_tokenizer_without_any_token_to_pad_with_is_refused(tmp_path):
    folder = saved(tmp_path / "model")
    hub_cache.word_tokenizer(["good", "day"]).save_pretrained(folder)
    edit(folder / "tokenizer_config.json", pad_token=None)
    edit(folder / "config.json", pad_token_id=2)  # the word good
    assert "has no padding token" in sentence_of(lambda: load_tokenizer(str(folder)))


def test_a_word_never_becomes_the_padding(tmp_path):
    """The configuration's default id, 0, is that of a character in a vocabulary of bytes."""
    folder = saved(tmp_path / "model", "gpt2")
    edit(folder / "config.json", pad_token_id=5)
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token == tokenizer.eos_token


# 12: what a model has room for


@pytest.mark.parametrize(
    ("kind", "changes", "positions"),
    [
        ("bert", {"max_position_embeddings": 64}, 64),
        ("bert", {"max_position_embeddings": 50}, 48),
        ("distilbert", {"max_position_embeddings": 64}, 64),
        ("roberta", {"max_position_embeddings": 66}, 64),
        ("roberta", {"max_position_embeddings": 64}, 62),
        ("xlm-roberta", {"max_position_embeddings": 66}, 64),
        ("gpt2", {"n_positions": 64}, 64),
        ("bart", {"max_position_embeddings": 64}, 64),
        ("electra", {"max_position_embeddings": 64}, 64),
        ("opt", {"max_position_embeddings": 64}, 64),
    ],
)
def test_fewer_positions_than_max_length_are_refused_before_training(
    tmp_path, own_artifacts, small_data, kind, changes, positions
):
    folder = saved(tmp_path / "model", kind, **changes)
    config = small(student_checkpoint=str(folder), teacher_checkpoint=str(saved(tmp_path / "teacher")), max_length=100)
    sentence = sentence_of(lambda: distill(config, data=small_data))
    assert f"max_length is 100, but {str(folder)!r} has positions for {positions} tokens" in sentence
    assert f"set max_length to at most {positions}." in sentence
    assert not list((own_artifacts / "checkpoints").glob("*/step-*"))
    assert distill(config.replace(max_length=positions), data=small_data).metrics["steps"] == 2
    as_teacher = config.replace(teacher_checkpoint=str(folder), student_checkpoint=str(tmp_path / "teacher"))
    assert f"positions for {positions} tokens" in sentence_of(lambda: distill(as_teacher, data=small_data))


@pytest.mark.parametrize(
    ("kind", "positions"),
    [("bert", 34), ("distilbert", 34), ("roberta", 32), ("gpt2", 34), ("bart", 34), ("opt", 34)],
)
def test_a_text_longer_than_the_positions_is_named_wherever_a_model_reads_it(tmp_path, kind, positions):
    """Whoever tokenizes the texts themselves has no `max_length` that is looked at beforehand."""
    short, tokenizer = tiny(kind, NAMES, **{"n_positions" if kind == "gpt2" else "max_position_embeddings": 34})
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    ids = torch.full((2, 40), 9)
    if tokenizer.eos_token_id is not None:  # BART's classifier looks for it
        ids[:, -1] = tokenizer.eos_token_id
    mask, labels = torch.ones_like(ids), torch.tensor([0, 1])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "id": torch.arange(2)}
    texts = datasets.Dataset.from_dict(
        {name: batch[name].tolist() for name in ("input_ids", "attention_mask", "labels")}
    )

    def train_with(student: torch.nn.Module, teacher: torch.nn.Module) -> None:
        DistillationTrainer(
            student,
            arguments(tmp_path, max_steps=1),
            teacher_model=teacher,
            train_dataset=texts,
            data_collator=collator(tokenizer),
        ).train()

    for read in (
        lambda: teacher_forward(freeze(short), batch),
        lambda: predict(short, [batch]),
        lambda: classifier_loss(short, temperature=1.0, alpha=0.0)(batch),
        lambda: train_with(short.train().requires_grad_(True), tiny(kind, NAMES)[0]),
        lambda: train_with(tiny(kind, NAMES)[0], short),
    ):
        sentence = sentence_of(read)
        assert (
            f"a text has 40 tokens (with padding), and the model {type(short).__name__} has positions for" in sentence
        )
        assert f" {positions} at most; cut texts when you tokenize them (truncation=True, max_length=…)." in sentence


def test_another_error_of_a_forward_pass_stays_what_it_is():
    model, _ = tiny("bert", NAMES)
    with pytest.raises(IndexError):
        teacher_forward(freeze(model), {"input_ids": torch.tensor([[10**6, 5]])})


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2147483648 bytes."),
    ],
)
def test_memory_that_runs_out_is_not_taken_for_a_text_that_is_too_long(error):
    model, _ = tiny("bert", NAMES, max_position_embeddings=34)
    with pytest.raises(type(error)) as raised, reading(model, {"input_ids": torch.full((1, 40), 9)}):
        raise error
    assert raised.value is error


@pytest.mark.parametrize("kind", ["llama", "t5", "xlnet", "deberta-v3", "modernbert", "funnel"])
def test_a_model_without_a_table_of_positions_takes_any_length(tmp_path, kind):
    folder = saved(tmp_path / "model", kind)
    model = load_classifier(str(folder), NAMES, seed=0).train()
    match_tokenizer(model, load_tokenizer(str(folder)), 500, kind)
    assert model.training, "it is left as it was"


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_tokens_that_the_table_lacks_are_refused_before_training(tmp_path, own_artifacts, small_data, role):
    folders = {name: saved(tmp_path / name) for name in ("teacher", "student")}
    tokenizer = load_tokenizer(str(folders[role]))
    tokenizer.add_tokens(["@user", "http"])
    tokenizer.save_pretrained(folders[role])
    config = small(**{f"{name}_checkpoint": str(folder) for name, folder in folders.items()})
    sentence = sentence_of(lambda: distill(config, data=small_data))
    rows = len(tokenizer) - 2
    assert f"has {rows + 2} tokens, but its embedding table {rows} rows; enlarge it" in sentence
    model = tiny("bert", NAMES)[0]
    model.resize_token_embeddings(len(tokenizer))  # the remedy
    model.save_pretrained(folders[role])
    assert distill(config, data=small_data).metrics["steps"] == 2


# 19: wrappers


def compiled(model: torch.nn.Module) -> torch.nn.Module:
    return torch.compile(model, backend="eager")


def in_peft(model: torch.nn.Module) -> torch.nn.Module:
    import peft  # slow to load

    return peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS"))


WRAPPERS = {
    "torch.compile": compiled,
    "DataParallel": torch.nn.DataParallel,
    "both": lambda model: torch.nn.DataParallel(compiled(model)),
    "peft": in_peft,
    "peft in torch.compile": lambda model: compiled(in_peft(model)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_gets_all_its_inputs(wrapper):
    model, tokenizer = tiny("bert", NAMES)
    wrapped = WRAPPERS[wrapper](model)
    batch = tokenizer(["good day", "so bad it is"], padding=True, return_tensors="pt")
    batch["token_type_ids"] = torch.ones_like(batch["token_type_ids"])
    inputs = model_inputs(wrapped, {**batch, "labels": torch.tensor([0, 1]), "id": torch.tensor([3, 4])})
    assert inputs.keys() == {"input_ids", "attention_mask", "token_type_ids"}
    inner = unwrapped(wrapped)
    assert type(inner) is type(model)
    assert "token_type_ids" in accepted_inputs(type(inner))
    with torch.no_grad():
        wanted = inner(**inputs).logits
        assert_close(wrapped.eval()(**inputs).logits, wanted)
    assert models.unwrapped(model) is model


def test_a_wrapper_around_something_else_is_refused():
    with pytest.raises(TypeError, match=r"^the model is Linear; give a model of transformers"):
        model_inputs(compiled(torch.nn.Linear(2, 2)), {"input_ids": torch.tensor([[1]])})


# 15: adapters


def adapter(folder: Path, base: Path, *, labels: bool = True) -> Path:
    """The files that peft writes for a LoRA adapter of two matrices with a trained head."""
    import peft  # slow to load

    model, tokenizer = load_classifier(str(base), NAMES, seed=3), load_tokenizer(str(base))
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["query"], "init_lora_weights": False}
    torch.manual_seed(5)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(task_type="SEQ_CLS", base_model_name_or_path=str(base), **settings)
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "classifier" in name:
                parameter.normal_()
    adapted.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if labels:
        (folder / "config.json").write_text(json.dumps({"id2label": {0: "positive", 1: "neutral", 2: "negative"}}))
    return folder


def test_an_adapter_says_what_it_is_where_peft_is_missing(tmp_path, monkeypatch, own_artifacts, small_data):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings = {"base_model_name_or_path": "google-bert/bert-base-uncased", "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    for call in (
        lambda: load_classifier(str(folder), NAMES, seed=0),
        lambda: load_tokenizer(str(folder)),
        lambda: models.checkpoint_version(str(folder)),
        lambda: warn_if_swapped(DistillConfig(teacher_checkpoint=str(folder), student_checkpoint=str(folder))),
        lambda: distill(small(teacher_checkpoint=str(folder)), data=small_data),
    ):
        sentence = sentence_of(call)
        assert "is no model but an adapter (LORA) of 'google-bert/bert-base-uncased'; install peft" in sentence


def test_a_model_and_an_adapter_in_one_folder_are_refused(tmp_path):
    folder = saved(tmp_path / "both")
    (folder / "adapter_config.json").write_text("{}")
    assert "holds a whole model and an adapter" in sentence_of(lambda: load_classifier(str(folder), NAMES, seed=0))


def test_an_adapter_is_merged_and_teaches(tmp_path, own_artifacts, small_data):
    import peft  # slow to load

    base = saved(tmp_path / "base")
    edit(base / "config.json", architectures=["BertModel"], id2label=None, label2id=None)
    rename(base, lambda name: None if "classifier" in name else name)
    folder = adapter(tmp_path / "adapter", base)
    merged = load_classifier(str(folder), NAMES, seed=0).eval()
    assert not any("lora" in name for name in merged.state_dict())
    reference = peft.PeftModel.from_pretrained(load_classifier(str(base), NAMES, seed=0), folder).eval()
    ids = torch.tensor([load_tokenizer(str(folder))("what a good day")["input_ids"]])
    with torch.no_grad():
        assert_close(merged(ids).logits, reference(input_ids=ids).logits.flip(-1), rtol=1e-4, atol=1e-5)
    config = small(teacher_checkpoint=str(folder), student_checkpoint=str(saved(tmp_path / "student")))
    run = distill(config, data=small_data)
    assert distill(config, data=small_data).folder == run.folder
    assert len(list((own_artifacts / "merged_adapters").glob("[0-9a-f]*"))) == 1
    retrain(base)
    edit(base / "config.json", architectures=["BertModel"], id2label=None, label2id=None)
    assert distill(config, data=small_data).folder != run.folder, "its base model is another"


def test_an_adapter_of_a_model_on_the_hub_is_merged_anew_when_that_changes(tmp_path, own_artifacts, monkeypatch):
    folder = adapter(tmp_path / "adapter", saved(tmp_path / "base"))
    edit(folder / "adapter_config.json", base_model_name_or_path="someone/base")
    monkeypatch.setattr(adapters, "_merge", lambda *_: tiny("bert", NAMES)[0])
    commits = iter(("first", "first", "second"))
    monkeypatch.setattr(adapters.hub, "commit", lambda name: next(commits))
    made = [adapters.merged(str(folder), str(folder), lambda base: base) for _ in range(3)]
    assert made[0] == made[1] != made[2]


def test_an_adapter_whose_labels_nobody_named_is_refused(tmp_path, own_artifacts):
    folder = adapter(tmp_path / "adapter", saved(tmp_path / "base"), labels=False)
    sentence = sentence_of(lambda: load_classifier(str(folder), NAMES, seed=0))
    assert "has 3 labels, but does not say which; put a config.json" in sentence


def test_an_adapter_of_another_model_is_refused(tmp_path, own_artifacts):
    folder = adapter(tmp_path / "adapter", saved(tmp_path / "base"))
    other = saved(tmp_path / "other", hidden_size=32)
    edit(folder / "adapter_config.json", base_model_name_or_path=str(other))
    sentence = sentence_of(lambda: load_classifier(str(folder), NAMES, seed=0))
    assert "can't be merged into" in sentence
    assert "check its base model" in sentence
