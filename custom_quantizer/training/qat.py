"""Training a prepared graph: modes, freezing, and a recipe that is a plain PyTorch loop.

What ``prepare_qat_pt2e`` returns is an ordinary module: any loop can train it. :func:`finetune` is
the loop that most would write::

    prepared = prepare_qat_pt2e(torch.export.export(model, example).module(), quantizer)
    qat.finetune(prepared, train_loader, epochs=3, validation=test_loader, checkpoint="qat.ckpt")
    converted = convert_pt2e(prepared)

It starts from calibrated ranges, follows a cosine from a learning rate that goes with the
narrowest width of the graph, freezes batch norms and then observers on the way, and leaves the
graph in evaluation mode, ready for ``convert_pt2e``.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import (
    FakeQuantizeBase,
    move_exported_model_to_eval,
    move_exported_model_to_train,
)

from custom_quantizer.calibration.run import GraphInputs, calibrate
from custom_quantizer.calibration.statistics import Source, load_statistics
from custom_quantizer.core.batch import LABEL_KEYS, Batch, label_key
from custom_quantizer.core.calls import CallForm
from custom_quantizer.core.graph import ADOPTED_KEY, state_kept
from custom_quantizer.core.progress import stages
from custom_quantizer.core.threads import exclusive, tools
from custom_quantizer.errors import CustomQuantizerError, TrainingError, first_line
from custom_quantizer.ops.rewrites.training_graph import (
    DROPOUTS,
    switch_calls,
    training_mode_of,
)
from custom_quantizer.training.checkpoint import TrainingCheckpoint, TrainingPosition
from custom_quantizer.training.fake_quantize import ActivationFakeQuantize, WeightFakeQuantize

__all__ = [
    "EpochMetrics",
    "Recipe",
    "TrainingSummary",
    "evaluation_mode",
    "finetune",
    "freeze_batch_norms",
    "freeze_observers",
    "learning_rate_for",
    "parameter_groups",
    "rounding",
    "training_mode",
]

logger = logging.getLogger(__name__)

Loss: TypeAlias = Callable[[Any, Any], Tensor]
"""``loss(outputs, labels)``: a scalar."""

Data: TypeAlias = Iterable[Any] | Callable[[int], Iterable[Any]]
"""Batches ``(inputs, labels)`` that can be walked through once an epoch, or a function of the
epoch (from 0) that gives them."""

_BATCH_NORM = torch.ops.aten.batch_norm.default


# ---------------------------------------------------------------------------------------------
# Modes
# ---------------------------------------------------------------------------------------------


def training_mode(prepared: GraphModule) -> GraphModule:
    """Move a prepared graph to training: dropouts drop, batch norms use the batch.

    ``torchao.quantization.pt2e.move_exported_model_to_train`` with what it forgets: torchao 0.18
    gives every dropout ``p=0.5`` and every batch norm that is not folded ``eps=1e-5`` and
    ``momentum=0.1``, whatever the model said; and it leaves other calls as they were captured:
    ``Dropout2d``, the dropout inside of attention and recurrent layers, ``RReLU``.

    Returns:
        ``prepared`` itself.

    Raises:
        TrainingError: it is not what ``prepare_qat_pt2e`` returns.
    """
    return _move(prepared, move_exported_model_to_train, training=True)


def evaluation_mode(prepared: GraphModule) -> GraphModule:
    """Move a prepared graph to evaluation; see :func:`training_mode`.

    Raises:
        TrainingError: it is not what ``prepare_qat_pt2e`` returns.
    """
    return _move(prepared, move_exported_model_to_eval, training=False)


@tools()
def _move(
    prepared: GraphModule, move: Callable[[GraphModule], Any], *, training: bool
) -> GraphModule:
    _check_prepared(prepared)
    before = [_literals(node) for node in _switched(prepared)]
    move(prepared)
    after = _switched(prepared)
    if len(before) != len(after):
        raise TrainingError(
            f"torchao rewrote {len(before)} dropouts and batch norms into {len(after)}; this "
            "package is made for torchao 0.18"
        )
    for node, literals in zip(after, before, strict=True):
        for index, value in literals.items():
            node.update_arg(index, value)
    switch_calls(prepared, training)
    prepared.recompile()
    return prepared


def _switched(model: GraphModule) -> list[Node]:
    return [n for n in model.graph.nodes if n.target in DROPOUTS or n.target is _BATCH_NORM]


def _literals(node: Node) -> dict[int, Any]:
    """The numbers of a call that have to survive torchao's rewriting, by position."""
    positions = (6, 7) if node.target is _BATCH_NORM else (1,)
    return {i: node.args[i] for i in positions}


def freeze_batch_norms(prepared: GraphModule, frozen: bool = True) -> None:
    """Let folded batch norms use their running statistics in training, too, or the batch again.

    Raises:
        TrainingError: it is not what ``prepare_qat_pt2e`` returns.
    """
    _check_prepared(prepared)
    mode = training_mode_of(prepared)
    if mode is not None:
        mode.frozen.fill_(int(frozen))


def freeze_observers(prepared: GraphModule, frozen: bool = True) -> None:
    """Keep the ranges of activations as they are, or let them follow the data again.

    Learned scales are parameters and go on learning.

    Raises:
        TrainingError: it is not what ``prepare_qat_pt2e`` returns.
    """
    for module in _fake_quantizers(prepared):
        module.enable_observer(not frozen)


def rounding(prepared: GraphModule, enabled: bool) -> None:
    """Turn rounding on or off; without it the graph computes what the float model does.

    Raises:
        TrainingError: it is not what ``prepare_qat_pt2e`` returns.
    """
    for module in _fake_quantizers(prepared):
        module.enable_fake_quant(enabled)


def _fake_quantizers(prepared: GraphModule) -> list[FakeQuantizeBase]:
    _check_prepared(prepared)
    return [module for module in prepared.modules() if isinstance(module, FakeQuantizeBase)]


def _check_prepared(prepared: object) -> None:
    if not isinstance(prepared, GraphModule):
        raise TrainingError(
            f"expected what prepare_qat_pt2e returns, got {type(prepared).__name__}: call "
            "prepare_qat_pt2e(torch.export.export(model, example).module(), quantizer) first"
        )
    if not any(isinstance(module, FakeQuantizeBase) for module in prepared.modules()):
        raise TrainingError(
            "the graph has no fake quantizers, so there is nothing to train for: pass what "
            "prepare_qat_pt2e returns (prepare_pt2e only observes), before convert_pt2e"
        )


# ---------------------------------------------------------------------------------------------
# The recipe
# ---------------------------------------------------------------------------------------------

_SGD_RATES = {2: 2e-2, 3: 2e-2, 4: 1e-2, 5: 5e-3, 6: 2e-3}
_ADAM_RATES = {2: 1e-3, 3: 5e-4, 4: 2e-4, 5: 1e-4, 6: 1e-4}

_SHORT, _LONG, _SHORT_SHARE = 30, 200, 0.1
"""From improved weights, trainings of up to ``_SHORT`` steps take this share of the learning rate
from plain ones, those of ``_LONG`` steps all of it, and others what is on the line between."""


def learning_rate_for(bits: int, optimizer: str = "sgd", adopted_steps: int | None = None) -> float:
    """The first learning rate for a graph whose narrowest tensor has ``bits`` bits.

    The coarser the grid, the farther a weight has to move before its integer changes; at 8 bits
    the network is nearly where it should be. At 4 and 8 bits the values are those of the study in
    ``docs/qat.md``, others follow them.

    A start from improved weights (:func:`~custom_quantizer.adopt`) has something to lose, and a
    short training cannot win it back: up to 30 steps its rate is a tenth, from 200 steps on it is
    that of a plain start. These two were measured, what is between them follows a line.

    Args:
        bits: of the narrowest tensor.
        optimizer: ``sgd`` or ``adam``.
        adopted_steps: steps of a training from improved weights; ``None``: from plain ones.
    """
    rates, least = (_ADAM_RATES, 5e-5) if optimizer == "adam" else (_SGD_RATES, 1e-3)
    rate = rates.get(bits, least)
    if adopted_steps is None:
        return rate
    long = min(max((adopted_steps - _SHORT) / (_LONG - _SHORT), 0.0), 1.0)
    return rate * (_SHORT_SHARE + (1 - _SHORT_SHARE) * long)


@dataclass(frozen=True)
class Recipe:
    """How a graph is trained.

    Attributes:
        optimizer: ``sgd`` with Nesterov momentum, or ``adam`` (AdamW).
        learning_rate: the first one; ``None`` chooses by the narrowest width
            (:func:`learning_rate_for`), and after :func:`~custom_quantizer.adopt` by the number
            of steps. It falls along a half cosine to 0.
        momentum: of SGD.
        weight_decay: of weights; biases, batch norms and learned scales have none.
        warmup: share of the steps in which the learning rate rises from 0.
        clip_norm: largest norm of all gradients together; ``None``: not clipped.
        freeze_batch_norms: share of the steps after which batch norms keep their statistics;
            ``None``: half of them, and 0 after :func:`~custom_quantizer.adopt`, whose integers
            were made for the statistics that the network has.
        freeze_observers: share of the steps after which activation ranges stay.
        calibration_batches: batches that set the first ranges, where nothing was seen before.
        label_smoothing: of the default loss.
        seed: of everything that draws random numbers through torch.

    Raises:
        TrainingError: a value is out of range.
    """

    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup: float = 0.05
    clip_norm: float | None = 5.0
    freeze_batch_norms: float | None = None
    freeze_observers: float = 0.75
    calibration_batches: int = 8
    label_smoothing: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in ("sgd", "adam"):
            raise TrainingError(f"optimizer {self.optimizer!r} is neither 'sgd' nor 'adam'")
        for name in ("warmup", "freeze_batch_norms", "freeze_observers"):
            share = getattr(self, name)
            if share is None and name == "freeze_batch_norms":
                continue
            if not 0 <= share <= 1:
                raise TrainingError(f"{name}={share}: a share of the steps, 0 to 1")
        for name in ("learning_rate", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise TrainingError(f"{name}={value}: a positive number, or None")
        if self.calibration_batches < 1:
            raise TrainingError(f"calibration_batches={self.calibration_batches}: at least 1")


@dataclass(frozen=True)
class EpochMetrics:
    """What one epoch gave.

    Attributes:
        epoch: from 1.
        loss: mean over the samples.
        accuracy: share of the training samples that were right when they were seen; ``None``
            where outputs and labels are not those of a classifier.
        learning_rate: at the end.
        validation_loss: of the validation data in evaluation mode, rounding on.
        validation_accuracy: likewise.
    """

    epoch: int
    loss: float
    accuracy: float | None
    learning_rate: float
    validation_loss: float | None = None
    validation_accuracy: float | None = None

    def __str__(self) -> str:
        text = f"epoch {self.epoch}: loss {self.loss:.4f}"
        if self.accuracy is not None:
            text += f", accuracy {self.accuracy:.2%}"
        if self.validation_loss is not None:
            text += f"; validation loss {self.validation_loss:.4f}"
        if self.validation_accuracy is not None:
            text += f", accuracy {self.validation_accuracy:.2%}"
        return text


@dataclass(frozen=True)
class TrainingSummary:
    """What a training did.

    Attributes:
        epochs: metrics of each.
        steps: updates of the parameters, those before a resume included.
        learning_rate: the largest.
        resumed: steps that had been done when a checkpoint was resumed.
        skipped: batches left out because a graph of a fixed batch does not take their size.
    """

    epochs: tuple[EpochMetrics, ...]
    steps: int
    learning_rate: float
    resumed: int = field(default=0, compare=False)
    skipped: int = 0

    def __str__(self) -> str:
        lines = [str(epoch) for epoch in self.epochs]
        text = f"{self.steps:,} steps, learning rate {self.learning_rate:g}"
        if self.skipped:
            text += f"; {self.skipped} batches of another size than the graph takes left out"
        return "\n".join([*lines, text])


def parameter_groups(prepared: GraphModule, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters for an optimizer: weights with decay; biases, norms and scales without.

    Raises:
        TrainingError: it is not what ``prepare_qat_pt2e`` returns.
    """
    _check_prepared(prepared)
    scales = {id(p) for m in _fake_quantizers(prepared) for p in m.parameters()}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in prepared.parameters():
        if parameter.requires_grad:
            decays = parameter.dim() > 1 and id(parameter) not in scales
            (decayed if decays else plain).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def finetune(
    prepared: GraphModule,
    data: Data,
    *,
    epochs: int = 1,
    recipe: Recipe | None = None,
    loss: Loss | None = None,
    validation: Data | None = None,
    start: Source | None = None,
    device: torch.device | str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 200,
    on_epoch: Callable[[EpochMetrics], None] | None = None,
    progress: bool | None = None,
) -> TrainingSummary:
    """Train a prepared graph in place.

    One training at a time: threads wait for each other. The state of the global random generators
    is the same afterwards. Buffers that the model itself writes keep what training left in them,
    as running statistics must; neither the first ranges nor validation change them.

    Args:
        prepared: what ``prepare_qat_pt2e`` returns.
        data: batches ``(inputs, labels)``, or dictionaries of inputs with ``labels`` (or
            ``label``, ``targets``) among them: a ``DataLoader``, a list, a
            :class:`~custom_quantizer.app.data.DataSource`, or a function of the epoch that gives
            them. Each epoch begins with a seed of its own, so a shuffling loader gives the same
            order when a training is resumed.
        epochs: walks through the data.
        recipe: optimizer, learning rate, what freezes when. After
            :func:`~custom_quantizer.adopt` the defaults of some are others: see :class:`Recipe`.
        loss: ``loss(outputs, labels)``; default: cross entropy.
        validation: labelled batches, evaluated after each epoch.
        start: calibration statistics to start from: a file of ``save_statistics``, or a model that
            was prepared with ``prepare_pt2e`` and calibrated. Default: the first batches of the
            data are run without rounding, unless the graph has seen data before.
        device: where to train, such as ``"cuda"``; the graph returns to where it was.
        checkpoint: a file that keeps the state. If it exists, training goes on where it stopped
            and ends with the same parameters, given the same data, recipe and software.
        checkpoint_every: steps between two writes; it is also written after each epoch.
        on_epoch: called with the metrics of each epoch.
        progress: True shows a bar, None does so at a terminal.

    Returns:
        The metrics. ``prepared`` is trained, in evaluation mode.

    Raises:
        TrainingError: there are no data, a batch has no labels or does not fit the graph, the
            loss is not finite, or the checkpoint belongs to another training.
        CalibrationError: the first ranges cannot be measured.
    """
    _check_prepared(prepared)
    if epochs < 1:
        raise TrainingError(f"epochs={epochs}: at least 1")
    if checkpoint_every < 1:
        raise TrainingError(f"checkpoint_every={checkpoint_every}: it counts steps, from 1")
    home = _device_of(prepared)
    if device is not None:
        prepared.to(device)
    try:
        with exclusive(), _random_state_kept():
            trainer = _Trainer(prepared, data, epochs, recipe or Recipe(), loss)
            trainer.begin(start, checkpoint)
            return trainer.run(validation, checkpoint_every, on_epoch, progress)
    finally:
        evaluation_mode(prepared)
        if device is not None and home is not None:
            prepared.to(home)


def _random_state_kept() -> AbstractContextManager[None]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return torch.random.fork_rng(devices)


def _device_of(model: nn.Module) -> torch.device | None:
    return next((parameter.device for parameter in model.parameters()), None)


def _narrowest(prepared: GraphModule) -> int:
    widths = [
        module.scheme.format.bits
        for module in prepared.modules()
        if isinstance(module, (ActivationFakeQuantize, WeightFakeQuantize))
    ]
    return min(widths, default=8)


class _Trainer:
    """One training: what moves while it runs."""

    def __init__(
        self, prepared: GraphModule, data: Data, epochs: int, recipe: Recipe, loss: Loss | None
    ) -> None:
        self.model = prepared
        self.data = data
        self.epochs = epochs
        self.recipe = recipe
        self.graph = GraphInputs.of(prepared)
        smoothing = recipe.label_smoothing
        self.loss = loss or (
            lambda y, t: nn.functional.cross_entropy(y, t, label_smoothing=smoothing)
        )
        self.adopted = bool(prepared.meta.get(ADOPTED_KEY, False))
        self.rate = 0.0
        share = recipe.freeze_batch_norms
        self.norms_freeze = (0.0 if self.adopted else 0.5) if share is None else share
        self.position = TrainingPosition()
        self.history: list[EpochMetrics] = []
        self.steps_per_epoch = 0
        self.skipped = 0
        self.file: TrainingCheckpoint | None = None

    # -- before the first step ----------------------------------------------------------------

    def begin(self, start: Source | None, checkpoint: str | os.PathLike[str] | None) -> None:
        self.steps_per_epoch = self._count()
        self.rate = self.recipe.learning_rate or learning_rate_for(
            _narrowest(self.model),
            self.recipe.optimizer,
            self.steps_per_epoch * self.epochs if self.adopted else None,
        )
        self.optimizer = self._make_optimizer()
        if checkpoint is not None:
            said = {
                **asdict(self.recipe),
                "learning_rate": self.rate,
                "freeze_batch_norms": self.norms_freeze,
                "epochs": self.epochs,
                "batches": self.steps_per_epoch,
            }
            self.file = TrainingCheckpoint(checkpoint, self.model, self.optimizer, said)
            position = self.file.resume()
            if position is not None:
                self.position = position
                self.history = [EpochMetrics(**entry) for entry in position.history]
                self.skipped = position.skipped
                return
        if start is not None:
            load_statistics(self.model, start)
        elif not any(m.has_range for m in self._activations()):
            self._calibrate()

    def _activations(self) -> Iterator[ActivationFakeQuantize]:
        for module in self.model.modules():
            if isinstance(module, ActivationFakeQuantize) and not module.is_dynamic:
                yield module

    def _calibrate(self) -> None:
        evaluation_mode(self.model)
        rounding(self.model, False)
        torch.manual_seed(self.recipe.seed)
        batches = islice(iter(self._epoch(0)), self.recipe.calibration_batches)
        device = _device_of(self.model)
        first = [_pair(batch, self.graph.form)[0] for batch in batches]
        calibrate(self.model, [_moved(inputs, device) for inputs in first])
        rounding(self.model, True)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        groups = parameter_groups(self.model, self.recipe.weight_decay)
        if self.recipe.optimizer == "adam":
            return torch.optim.AdamW(groups, lr=self.rate)
        momentum = self.recipe.momentum
        return torch.optim.SGD(groups, lr=self.rate, momentum=momentum, nesterov=momentum > 0)

    def _epoch(self, epoch: int) -> Iterable[Any]:
        return self.data(epoch) if callable(self.data) else self.data

    def _count(self) -> int:
        """Batches of an epoch, which the schedule needs to know."""
        batches = self._epoch(0)
        try:
            count = len(batches)  # type: ignore[arg-type]
        except TypeError:
            if iter(batches) is batches and not callable(self.data):
                raise TrainingError(
                    "the training data is a generator, which can be walked through only once; "
                    "pass a DataLoader, a list, or a function of the epoch that returns batches"
                ) from None
            torch.manual_seed(self.recipe.seed)
            count = sum(1 for _ in batches)
        if not count:
            raise TrainingError("the training data holds no batch")
        return count

    # -- training -----------------------------------------------------------------------------

    def run(
        self,
        validation: Data | None,
        checkpoint_every: int,
        on_epoch: Callable[[EpochMetrics], None] | None,
        progress: bool | None,
    ) -> TrainingSummary:
        resumed = self.position.step
        for epoch in range(self.position.epoch, self.epochs):
            label = f"train epoch {epoch + 1} of {self.epochs}"
            with stages(label, self.steps_per_epoch, progress) as stage:
                self._train_epoch(epoch, checkpoint_every, stage)
            metrics = self._metrics(epoch, validation)
            self.history.append(metrics)
            logger.info("%s", metrics)
            self.position = TrainingPosition(epoch + 1, 0, self.position.step)
            self._save()
            if on_epoch is not None:
                on_epoch(metrics)
        return TrainingSummary(
            tuple(self.history), self.position.step, self.rate, resumed, self.skipped
        )

    def _train_epoch(self, epoch: int, checkpoint_every: int, stage: Callable[[str], None]) -> None:
        training_mode(self.model)
        torch.manual_seed(self.recipe.seed * 1_000_003 + epoch)
        batches = iter(self._epoch(epoch))
        done = self.position.batch
        # What was done before an interruption is read again, but not run.
        for _ in islice(batches, done):
            pass
        if done and self.file is not None:
            self.file.restore_random_state()
        for index, batch in enumerate(batches, done):
            if index >= self.steps_per_epoch:
                raise TrainingError(
                    f"epoch {epoch + 1} has more than the {self.steps_per_epoch} batches of the "
                    "first one; every epoch must have as many"
                )
            mean = self.position.loss / self.position.samples if self.position.samples else 0.0
            stage(f"loss {mean:.4f}" if mean else "")
            self._step(batch, f"epoch {epoch + 1}, batch {index}")
            self.position.batch = index + 1
            if self.file is not None and self.position.step % checkpoint_every == 0:
                self._save()
        if not self.position.samples:
            raise TrainingError(
                f"epoch {epoch + 1} has no batch that the graph takes ({self.graph}): capture the "
                "model with a dynamic batch, or give batches of that size"
            )

    def _step(self, batch: Any, where: str) -> None:
        inputs, labels = _pair(batch, self.graph.form)
        device = _device_of(self.model)
        values = self._fit(_moved(inputs, device), where)
        if values is None:
            self.skipped += 1
            return
        self._schedule()
        outputs = self._forward(values, where)
        labels = _moved(labels, device)
        loss = self._loss_of(outputs, labels, where)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TrainingError(f"{where}: the loss is not one number: {loss!r}")
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"{where}: the loss is {float(loss)}; choose a smaller learning rate (now "
                f"{self.rate:g}) or a smaller clip_norm, and look for such values in the data"
            )
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        if self.recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        size = self.graph.batch_size(values)
        self.position.step += 1
        self.position.samples += size
        self.position.loss += float(loss.detach()) * size
        right = _right(outputs, labels)
        self.position.right = None if right is None else (self.position.right or 0) + right

    def _forward(self, values: list[Any], where: str) -> Any:
        args, kwargs = self.graph.arguments(values)
        try:
            return self.model(*args, **kwargs)
        except CustomQuantizerError as error:
            raise TrainingError(f"{where}: {error}") from error
        except Exception as error:
            raise TrainingError(f"{where}: the graph failed with {first_line(error)}") from error

    def _loss_of(self, outputs: Any, labels: Any, where: str) -> Any:
        try:
            return self.loss(outputs, labels)
        except Exception as error:  # a function of the caller's may raise anything
            raise TrainingError(
                f"{where}: the loss failed with {first_line(error)}; by default it is cross "
                "entropy, of integer labels that are classes the model scores"
            ) from error

    def _fit(self, inputs: Any, where: str) -> list[Any] | None:
        """Inputs as the graph takes them; ``None`` for a batch of a size that it does not take."""
        try:
            values = self.graph.fit(inputs, where)
        except CustomQuantizerError as error:
            raise TrainingError(str(error)) from error
        if self.graph.batch is None:
            return values
        low, high = self.graph.batch
        size = self.graph.batch_size(values)
        return values if size >= low and (high is None or size <= high) else None

    def _schedule(self) -> None:
        """Learning rate of this step, and what freezes from it on."""
        total = self.steps_per_epoch * self.epochs
        step = self.position.step
        warm = self.recipe.warmup * total
        rising = min(1.0, (step + 1) / warm) if warm >= 1 else 1.0
        rate = self.rate * rising * 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        freeze_batch_norms(self.model, step >= self.norms_freeze * total)
        freeze_observers(self.model, step >= self.recipe.freeze_observers * total)

    def _metrics(self, epoch: int, validation: Data | None) -> EpochMetrics:
        found: tuple[float, float | None] | None = None
        if validation is not None:
            evaluation_mode(self.model)
            with torch.random.fork_rng(devices=[]), state_kept(self.model):
                found = self._validate(validation(epoch) if callable(validation) else validation)
        position = self.position
        return EpochMetrics(
            epoch + 1,
            position.loss / position.samples,
            None if position.right is None else position.right / position.samples,
            float(self.optimizer.param_groups[0]["lr"]),
            *(found or (None, None)),
        )

    def _validate(self, batches: Iterable[Any]) -> tuple[float, float | None]:
        """Loss and accuracy, rounding as in training but observing nothing."""
        states = [(m, m.observer_enabled.clone()) for m in _fake_quantizers(self.model)]
        freeze_observers(self.model)
        total, samples, right = 0.0, 0, 0
        device = _device_of(self.model)
        is_classifier = True
        with torch.no_grad():
            for index, batch in enumerate(batches):
                where = f"validation batch {index}"
                inputs, labels = _pair(batch, self.graph.form)
                values = self._fit(_moved(inputs, device), where)
                if values is None:
                    self.skipped += 1
                    continue
                outputs = self._forward(values, where)
                labels = _moved(labels, device)
                size = self.graph.batch_size(values)
                loss = float(self._loss_of(outputs, labels, where))
                total, samples = total + loss * size, samples + size
                found = _right(outputs, labels)
                is_classifier = is_classifier and found is not None
                right += found or 0
        for module, state in states:
            module.observer_enabled.copy_(state)
        if not samples:
            raise TrainingError(
                f"the validation data has no batch that the graph takes ({self.graph})"
            )
        return total / samples, right / samples if is_classifier else None

    def _save(self) -> None:
        if self.file is not None:
            self.position.history = [asdict(entry) for entry in self.history]
            self.position.skipped = self.skipped
            self.file.save(self.position)


def _pair(batch: Any, form: CallForm) -> tuple[Any, Any]:
    """Inputs and labels of a batch."""
    if (key := label_key(batch, form.keys)) is not None:
        return batch, batch[key]
    if isinstance(batch, Batch):
        if batch.labels is None:
            raise TrainingError("the training data has no labels")
        return batch.inputs, batch.labels
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    shown = f"{len(batch)} values" if isinstance(batch, (tuple, list)) else type(batch).__name__
    raise TrainingError(
        f"a batch of training data is a pair of inputs and labels, not {shown}; several inputs go "
        "into a tuple or a dictionary: ((x, y), labels); labels in a dictionary of inputs are "
        f"called {LABEL_KEYS[0]}"
    )


def _moved(value: Any, device: torch.device | None) -> Any:
    if isinstance(value, Tensor):
        return value.to(device) if device is not None else value
    if isinstance(value, Mapping):
        return {key: _moved(entry, device) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [_moved(entry, device) for entry in value]
    return value


def _right(outputs: Any, labels: Any) -> int | None:
    """How many samples have their highest score at the label; ``None`` without classes."""
    if not isinstance(outputs, Tensor) or not isinstance(labels, Tensor):
        return None
    if outputs.dim() != 2 or labels.dim() != 1 or labels.is_floating_point():
        return None
    return int((outputs.detach().argmax(1) == labels).sum())
