"""The losses of other toolkits, each called through the toolkit's own code.

A toolkit is installed into a folder of its own (see `conformance`), and only there can its adapters run: they load it
when they are called. So this module can be imported without any of them. Shapes: N examples, C classes; for the
toolkits that know tokens also B texts, L tokens of each, V tokens in the vocabulary.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import import_module as load
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from kd_helpers.losses import distillation_loss


class Batch(NamedTuple):
    """Logits of student and teacher, `[N, C]` or `[B, L, V]`, and labels, `[N]` or `[B, L]`, −100 for none."""

    student: torch.Tensor
    teacher: torch.Tensor
    labels: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Call:
    """One way of calling a toolkit's distillation loss.

    Attributes:
        name: what a user of the toolkit writes.
        adapter: takes a batch, the temperature (if `takes_temperature`) and the weights, and returns a scalar.
        weights: the toolkit's own names of its weights. One name: the adapter takes this number, and the toolkit gives
            the other loss the rest. Two: the adapter takes the weight of the soft loss, then that of the hard loss.
            None: the toolkit has the soft loss only, and its user adds the hard loss and both weights.
        takes_temperature: otherwise the user divides the logits.
        tokens: whether it takes `[B, L, V]` too.
        timed: whether its time and memory are held against ours (see `token_speed`).
        precision: the widest in which it computes.
    """

    name: str
    adapter: Callable[..., torch.Tensor]
    weights: tuple[str, ...] = ()
    takes_temperature: bool = True
    tokens: bool = False
    timed: bool = False
    precision: torch.dtype = torch.float64


@dataclasses.dataclass(frozen=True)
class Toolkit:
    """A package, what is installed for it, and its losses.

    Attributes:
        name: as its project writes it.
        requirements: what pip installs, without their dependencies; the first is the package itself.
        calls: its losses.
    """

    name: str
    requirements: tuple[str, ...]
    calls: tuple[Call, ...]


def cross_entropy(batch: Batch) -> torch.Tensor:
    """What users of a toolkit that has no hard loss of its own add or hand over: PyTorch's, with its −100."""
    return F.cross_entropy(batch.student.flatten(0, -2), batch.labels.flatten())


# --- This course ---


def this_course(batch: Batch, temperature: float, alpha: float) -> torch.Tensor:
    """`kd_helpers.distillation_loss`, so that it is measured as the others are."""
    return distillation_loss(*batch, temperature=temperature, alpha=alpha).total


# --- Classifiers ---


def torchdistill_kd_loss(batch: Batch, temperature: float, alpha: float) -> torch.Tensor:  # pragma: no cover
    """torchdistill's KDLoss, which takes the outputs of modules by their paths."""
    paths = {f"{who}_module_{what}": "output" for who in ("student", "teacher") for what in ("path", "io")}
    loss = load("torchdistill.losses.mid_level").KDLoss(**paths, temperature=temperature, alpha=alpha)
    return loss({"output": {"output": batch.student}}, {"output": {"output": batch.teacher}}, batch.labels)


def keras_distiller(
    batch: Batch, temperature: float, weight: float, loss: str = "kl_divergence"
) -> torch.Tensor:  # pragma: no cover
    """Keras' Distiller with LogitsDistillation, on the torch backend; the teacher's input is its output.

    The soft loss is given by its name, which is the default, or as the class of that name.
    """
    keras = load("keras")
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    soft = loss if loss == "kl_divergence" else getattr(keras.losses, loss)()

    def passing_on() -> Any:
        inputs = keras.Input((batch.student.shape[-1],))
        return keras.Model(inputs, keras.layers.Activation("linear")(inputs))

    distiller = keras.distillation.Distiller(
        teacher=passing_on(),
        student=passing_on(),
        distillation_losses=keras.distillation.LogitsDistillation(temperature=temperature, loss=soft),
        student_loss_weight=weight,
    )
    distiller.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-100))
    return distiller.compute_loss(x=batch.teacher, y=batch.labels, y_pred=batch.student)


def modelopt_logits(
    batch: Batch, temperature: float, weight: float, **choices: str
) -> torch.Tensor:  # pragma: no cover
    """ModelOpt's distillation model with LogitsDistillationLoss and StaticLossBalancer."""
    distill = load("modelopt.torch.distill")
    mode = {
        "teacher_model": _Chosen(1),
        "criterion": distill.LogitsDistillationLoss(temperature=temperature, **choices),
        "loss_balancer": distill.StaticLossBalancer(kd_loss_weight=float(weight)),
    }
    model = distill.convert(_Chosen(0), mode=[("kd_loss", mode)])
    model(batch.student, batch.teacher)
    return model.compute_kd_loss(student_loss=cross_entropy(batch))


def textbrewer_distiller(
    batch: Batch, temperature: float, soft: float, hard: float, kind: str = "ce"
) -> torch.Tensor:  # pragma: no cover
    """TextBrewer's BasicDistiller; its loss takes what the adaptors of a user return."""
    textbrewer = load("textbrewer")
    with tempfile.TemporaryDirectory() as folder:
        distiller = textbrewer.BasicDistiller(
            textbrewer.TrainingConfig(device="cpu", output_dir=folder),
            textbrewer.DistillationConfig(
                temperature=temperature, kd_loss_weight=soft, hard_label_weight=hard, kd_loss_type=kind
            ),
            *(_Chosen(1), _Chosen(0), None, None),
        )
    results = {"logits": [batch.student], "losses": [cross_entropy(batch)]}
    return distiller.compute_loss(results, {"logits": [batch.teacher]})[0]


def timm_task(batch: Batch, temperature: float, weight: float) -> torch.Tensor:  # pragma: no cover
    """timm's LogitDistillationTask, whose models take the same input: here both logits at once."""
    # PyPI's torchvision for Linux holds operators for CUDA only. timm's losses need none of them, but the import does.
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
    tasks = load("timm.task.distillation")
    settings = {"num_classes": batch.student.shape[-1], "in_chans": 3}
    student, teacher = (_Chosen(which, **settings, pretrained_cfg={"mean": (0.0,), "std": (1.0,)}) for which in (0, 1))
    task = tasks.LogitDistillationTask(
        student,
        tasks.DistillationTeacher(teacher, **settings),
        criterion=nn.CrossEntropyLoss(),
        task_loss_weight=weight,
        temperature=temperature,
        verbose=False,
    )
    return task(torch.stack([batch.student, batch.teacher]), batch.labels)["loss"]


def neural_compressor_loss(
    batch: Batch, temperature: float, weight: float, kind: str = "CE"
) -> torch.Tensor:  # pragma: no cover
    """Neural Compressor's KnowledgeDistillationLoss of PyTorch; its soft loss is cross-entropy, or KL."""
    criterions = load("neural_compressor.compression.distillation.criterions")
    loss = criterions.PyTorchKnowledgeDistillationLoss(
        temperature=temperature, loss_types=["CE", kind], loss_weights=[1 - weight, weight]
    )
    return loss.loss_cal_sloss(batch.student, batch.teacher, loss.loss_cal(batch.student, batch.labels))


def sentence_transformers_kl(batch: Batch, temperature: float) -> torch.Tensor:  # pragma: no cover
    """sentence-transformers' DistillKLDivLoss: the scores of C documents take the place of C logits."""
    losses = load("sentence_transformers.sentence_transformer.losses")
    util = load("sentence_transformers.util")
    loss = losses.DistillKLDivLoss(None, similarity_fct=util.pairwise_dot_score, temperature=temperature)
    documents = [row.expand_as(batch.student) for row in torch.eye(batch.student.shape[-1], dtype=torch.float64)]
    return loss.compute_loss_from_embeddings([batch.student, *documents], batch.teacher)


def mmrazor_kl(batch: Batch, temperature: float) -> torch.Tensor:  # pragma: no cover
    """MMRazor's KLDivergence."""
    return load("mmrazor.models.losses").KLDivergence(tau=temperature)(batch.student, batch.teacher)


def kd_lib_vanilla(batch: Batch, temperature: float, weight: float) -> torch.Tensor:  # pragma: no cover
    """KD-Lib's VanillaKD with its default loss."""
    trainer = SimpleNamespace(temp=temperature, distil_weight=weight, loss_fn=nn.KLDivLoss())
    return load("KD_Lib.KD").VanillaKD.calculate_kd_loss(trainer, batch.student, batch.teacher, batch.labels)


def paddleslim_dml(batch: Batch, temperature: float) -> torch.Tensor:  # pragma: no cover
    """PaddleSlim's losses, which are PaddlePaddle's."""
    return load("paddleslim.dygraph.dist.losses").CELoss()(batch.student / temperature, batch.teacher / temperature)


# --- Tokens ---


def trl_generalized_jsd(batch: Batch, temperature: float, **choices: float) -> torch.Tensor:  # pragma: no cover
    """trl's generalized_jsd_loss; beta 0 is forward KL, and its default is 0.5."""
    loss = load("trl.experimental.gkd").GKDTrainer.generalized_jsd_loss
    return loss(*batch, temperature=temperature, **choices)


def trl_gkd_trainer(batch: Batch, temperature: float) -> torch.Tensor:  # pragma: no cover
    """trl's GKDTrainer: its loss of a batch, in which each position predicts the next."""
    trainers = load("trl.experimental.gkd").GKDTrainer
    student, teacher, labels = (
        part if batch.labels.ndim == 2 else part[:, None] for part in (batch.student, batch.teacher, batch.labels)
    )
    moved = F.pad(labels, (1, 0), value=-100)

    def model(logits: torch.Tensor) -> nn.Module:
        outputs = SimpleNamespace(logits=F.pad(logits, (0, 0, 0, 1)))  # the last position predicts nothing
        return _Returning(outputs)

    trainer = SimpleNamespace(
        teacher_model=model(teacher),
        beta=0.0,
        temperature=temperature,
        generalized_jsd_loss=trainers.generalized_jsd_loss,
    )
    inputs = {"input_ids": moved, "attention_mask": moved, "labels": moved}
    return trainers.compute_loss(trainer, model(student), inputs)


def trl_distillation_trainer(batch: Batch, temperature: float) -> torch.Tensor:  # pragma: no cover
    """The loss of trl's DistillationTrainer: hidden states that are the logits, and heads that change nothing."""
    head = torch.eye(batch.student.shape[-1])
    student, teacher, labels = (
        part if batch.labels.ndim == 2 else part[:, None] for part in (batch.student, batch.teacher, batch.labels)
    )
    loss = load("trl.trainer.distillation_trainer")._chunked_divergence_loss
    return loss(student, teacher, head, head, labels != -100, beta=0.0, temperature=temperature)[0]


def torchtune_forward_kl(batch: Batch) -> torch.Tensor:  # pragma: no cover
    """torchtune's ForwardKLLoss, which has no temperature."""
    return load("torchtune.modules.loss").ForwardKLLoss()(*batch)


def torchtune_chunked(batch: Batch, chunks: int = 8) -> torch.Tensor:  # pragma: no cover
    """torchtune's ForwardKLWithChunkedOutputLoss, which takes lists of logits, cut along the texts' length."""
    loss = load("torchtune.modules.loss").ForwardKLWithChunkedOutputLoss(num_output_chunks=chunks)
    student, teacher = (part if part.ndim == 3 else part[None] for part in (batch.student, batch.teacher))
    labels = batch.labels if batch.labels.ndim == 2 else batch.labels[None]
    return loss([*student.chunk(chunks, dim=1)], [*teacher.chunk(chunks, dim=1)], labels)


def swift_gkd_loss(batch: Batch, temperature: float) -> torch.Tensor:  # pragma: no cover
    """ms-swift's gkd_loss as forward KL, divided by the number of tokens as its trainer does."""
    gkd = load("swift.rlhf_trainers.gkd_loss")
    student, teacher, labels = (
        part if batch.labels.ndim == 2 else part[None] for part in (batch.student, batch.teacher, batch.labels)
    )
    answers = gkd.TeacherOutput(full_logits=teacher, labels=labels)
    total, valid = gkd.gkd_loss(student, answers, labels, beta=0.0, temperature=temperature)
    return total / valid


def liger_fused_jsd(batch: Batch, temperature: float, soft: float, hard: float) -> torch.Tensor:  # pragma: no cover
    """Liger's LigerFusedLinearJSDLoss as forward KL, with heads that change nothing."""
    loss = load("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
        weight_hard_loss=hard, weight_soft_loss=soft, beta=0.0, temperature=temperature, compiled=False
    )
    head = torch.eye(batch.student.shape[-1]).requires_grad_()
    student, teacher = (logits.flatten(0, -2) for logits in (batch.student, batch.teacher))
    return loss(student, head, teacher, head.detach(), batch.labels.flatten())


def liger_jsd_kernel(batch: Batch, temperature: float) -> torch.Tensor:  # pragma: no cover
    """Liger's LigerJSD, a kernel for GPUs."""
    log_q, log_p = ((logits / temperature).log_softmax(dim=-1) for logits in batch[:2])
    return load("liger_kernel.transformers").LigerJSD(beta=0.0)(log_q, log_p, batch.labels)


class _Chosen(nn.Module):
    """A model that returns one of its inputs: the student's logits or the teacher's."""

    def __init__(self, which: int, **attributes: Any) -> None:
        super().__init__()
        self.which = which
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *both: torch.Tensor) -> torch.Tensor:  # pragma: no cover
        return both[self.which] if len(both) > 1 else both[0][self.which]


class _Returning(nn.Module):
    """A model that returns the same whatever it is given."""

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, **_: Any) -> Any:  # pragma: no cover
        return self.outputs


TOKENS = {"tokens": True}
TORCHTUNE = {"takes_temperature": False, "precision": torch.float32, "tokens": True, "timed": True}
TOOLKITS = (
    Toolkit(
        "this course",
        ("kd-helpers",),
        (Call("distillation_loss", this_course, ("alpha",), precision=torch.float32),),
    ),
    Toolkit("torchdistill", ("torchdistill==1.1.5",), (Call("KDLoss", torchdistill_kd_loss, ("alpha",)),)),
    Toolkit(
        "Keras",
        ("keras==3.15.1", "absl-py==2.5.1", "optree==0.20.0", "h5py==3.16.0", "namex==0.1.0"),
        (
            Call("LogitsDistillation", keras_distiller, ("student_loss_weight",)),
            Call(
                "LogitsDistillation(loss=KLDivergence())",
                partial(keras_distiller, loss="KLDivergence"),
                ("student_loss_weight",),
            ),
        ),
    ),
    Toolkit(
        "NVIDIA ModelOpt",
        (
            "nvidia-modelopt==0.47.0",
            "omegaconf==2.4.0",
            "antlr4-python3-runtime==4.9.3",
            "pulp==3.3.2",
            "nvidia-ml-py==13.615.71",
        ),
        (
            Call("LogitsDistillationLoss", modelopt_logits, ("kd_loss_weight",)),
            Call(
                'LogitsDistillationLoss(reduction="batchmean")',
                partial(modelopt_logits, reduction="batchmean"),
                ("kd_loss_weight",),
            ),
        ),
    ),
    Toolkit(
        "TextBrewer",
        ("textbrewer==0.2.1.post1", "tensorboard==2.21.0", "absl-py==2.5.1"),
        (
            Call('BasicDistiller(kd_loss_type="ce")', textbrewer_distiller, ("kd_loss_weight", "hard_label_weight")),
            Call(
                'BasicDistiller(kd_loss_type="mse")',
                partial(textbrewer_distiller, kind="mse"),
                ("kd_loss_weight", "hard_label_weight"),
            ),
        ),
    ),
    Toolkit(
        "timm",
        ("timm==1.0.31", "torchvision==0.28.0"),
        (Call("LogitDistillationTask", timm_task, ("task_loss_weight",)),),
    ),
    Toolkit(
        "Neural Compressor",
        (
            *("neural-compressor==2.6", "deprecated==1.3.1", "wrapt==2.5.2", "py-cpuinfo==9.0.0", "schema==0.7.8"),
            *("prettytable==3.18.0", "pycocotools==2.0.11", "setuptools==75.8.0", "opencv-python-headless==5.0.0.93"),
        ),
        (
            Call("KnowledgeDistillationLoss", neural_compressor_loss, ("loss_weights[1]",)),
            Call(
                'KnowledgeDistillationLoss(["CE", "KL"])',
                partial(neural_compressor_loss, kind="KL"),
                ("loss_weights[1]",),
            ),
        ),
    ),
    Toolkit(
        "sentence-transformers",
        ("sentence-transformers==6.2.0",),
        (Call("DistillKLDivLoss", sentence_transformers_kl),),
    ),
    Toolkit(
        "trl",
        ("trl==1.16.0",),
        (
            Call("generalized_jsd_loss(beta=0)", partial(trl_generalized_jsd, beta=0.0), timed=True, **TOKENS),
            Call("generalized_jsd_loss", trl_generalized_jsd, **TOKENS),
            Call("GKDTrainer(beta=0)", trl_gkd_trainer, **TOKENS),
            Call("DistillationTrainer(beta=0)", trl_distillation_trainer, precision=torch.float32, **TOKENS),
        ),
    ),
    Toolkit(
        "torchtune",
        (
            *("torchtune==0.6.1", "torchao==0.14.1", "sentencepiece==0.2.3", "tiktoken==0.14.0", "torchdata==0.11.0"),
            *("omegaconf==2.4.0", "antlr4-python3-runtime==4.9.3", "blobfile==3.3.0", "lxml==6.1.3"),
            "pycryptodomex==3.24.2",
        ),
        (
            Call("ForwardKLLoss", torchtune_forward_kl, **TORCHTUNE),
            Call("ForwardKLWithChunkedOutputLoss", torchtune_chunked, **TORCHTUNE),
        ),
    ),
    Toolkit("ms-swift", ("ms-swift==4.6.0",), (Call("gkd_loss(beta=0)", swift_gkd_loss, timed=True, **TOKENS),)),
    Toolkit(
        "Liger Kernel",
        ("liger-kernel==0.8.5",),
        (
            Call(
                "LigerFusedLinearJSDLoss(beta=0)",
                liger_fused_jsd,
                ("weight_soft_loss", "weight_hard_loss"),
                precision=torch.float32,
                **TOKENS,
            ),
            Call("LigerJSD(beta=0)", liger_jsd_kernel),
        ),
    ),
    Toolkit(
        "MMRazor",
        (
            *("mmrazor==1.0.0", "mmengine==0.10.7", "mmcv-lite==2.0.1", "opencv-python-headless==5.0.0.93"),
            *("termcolor==3.3.0", "addict==2.4.0", "yapf==0.43.0", "terminaltables==3.1.10"),
        ),
        (Call("KLDivergence", mmrazor_kl),),
    ),
    Toolkit(
        "KD-Lib",
        (*("KD-Lib==0.0.32", "tensorboard==2.21.0", "absl-py==2.5.1"),),
        (Call("VanillaKD", kd_lib_vanilla, ("distil_weight",)),),
    ),
    Toolkit("PaddleSlim", ("paddleslim==2.6.0",), (Call("CELoss", paddleslim_dml),)),
)
