"""What a pruning method gets to work with: the model, its structure and calibration tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from typing import Any, TypeVar

from lightning.pytorch.utilities.memory import garbage_collection_cuda
from torch import Tensor, nn

from lit_prune.calibration.moments import dense_statistics
from lit_prune.calibration.statistics import InputStatistics
from lit_prune.calibration.stream import Stream
from lit_prune.cutting.layerwise import Ranks
from lit_prune.errors import UserError
from lit_prune.memory import fits, halves
from lit_prune.notes import several_processes
from lit_prune.progress import track
from lit_prune.structure.counting import unique_labels
from lit_prune.structure.model import Label, Structure

Batch = Mapping[str, Tensor]
T = TypeVar("T")


@dataclass
class Calibration:
    """One evaluation of a model on calibration tokens.

    Attributes:
        model: The model, as it is at present.
        structure: Its structure.
        batches: This process' calibration batches, `input_ids`, `attention_mask` and mostly
            `labels`, [batch, tokens].
        axes: What may be cut.
        held: Batches set aside, on which no score is taken.
        ranks: What processes share.
        iteration: How many times the model was pruned before.
        goal: Share of the original decoder's parameters that goes in all cuts together, if there
            are several.
        seed: Seed of whatever is drawn; the same on every process.
        title: Begins the text of progress bars.
        shown: Whether to show them.
    """

    model: Any
    structure: Structure
    batches: Sequence[Batch]
    axes: tuple[str, ...]
    held: Sequence[Batch] = ()
    ranks: Ranks = field(default_factory=Ranks)
    iteration: int = 0
    goal: float | None = None
    seed: int = 0
    title: str = "pruning"
    shown: bool = False

    def track(self, text: str, *, changes: bool = False) -> Callable[[Any], Iterator[Any]]:
        """Wraps what it is given in a progress bar.

        Args:
            text: What is being done.
            changes: Whether it goes over the layers and leaves each as it shall stay.
        """
        return lambda items: track(items, f"{self.title}: {text}", self.shown)

    def layers(self) -> Iterator[int]:
        """The layers in turn, for what reads weights.

        In a model larger than memory only the layer that was given last has any, and `moments`.
        """
        return iter(range(len(self.structure.widths.layers)))

    def stream(self, batches: Sequence[Batch] | None = None) -> Stream:
        """The batches' hidden states before the first layer.

        Args:
            batches: Others than the calibration batches.
        """
        return Stream(self.model, self.structure, self.batches if batches is None else batches)

    @cached_property
    def labels(self) -> list[Label]:
        """Labels of the model's parameters, each once."""
        return unique_labels(self.model, self.structure)

    @cached_property
    def moments(self) -> dict[tuple[int, str], InputStatistics]:
        """Mean and variance of the readers' inputs in the model as it is, by layer and axis."""
        return dense_statistics(
            self.model,
            self.structure,
            self.stream(),
            [axis for axis in self.axes if axis != "hidden"],
            ranks=self.ranks,
            track=self.track("statistics"),
        )

    def halved(self) -> Calibration:
        """The same with each calibration batch in two, as far as they have several windows.

        Raises:
            UserError: None has.
        """
        most = max((len(batch["input_ids"]) for batch in self.batches), default=0)
        smaller = copy.copy(self)
        smaller.batches = []
        for batch in self.batches:
            whole = len(batch["input_ids"]) == 1 < most
            smaller.batches += [batch] if whole else halves(batch)
        return smaller

    def reader(self, layer: int, axis: str) -> nn.Module:
        """The module of a layer that reads an axis."""
        return self.model.get_submodule(self.structure.readers(self.model, axis, layer)[0].path)


def with_smaller_batches(
    calibration: Calibration, run: Callable[[Calibration], T]
) -> tuple[T, Calibration]:
    """Do something with calibration batches; with smaller ones if memory runs out.

    Args:
        calibration: The model and its calibration tokens.
        run: Changes nothing.

    Returns:
        What it returns, and the calibration that it got in the end.

    Raises:
        UserError: A single window is too large; or there are other processes, which would wait.
    """
    found: list[T] = []
    while not fits(lambda own=calibration: found.append(run(own))):
        if several_processes():
            raise UserError(
                "expected memory for calibration on each process, got too little on one, which "
                "can't try again alone; lower the method's batch_size"
            )
        garbage_collection_cuda()  # graphs may be cycles
        calibration = calibration.halved()
    return found[0], calibration


def draw_batches(
    trainer: Any, samples: int, length: int, batch_size: int, turn: int = 0
) -> list[Any]:
    """Calibration batches of all processes, from the trainer's data module.

    Args:
        trainer: The trainer.
        samples: Number of windows.
        length: Tokens of a window.
        batch_size: Windows in a batch.
        turn: Number of the draw, where a method draws anew each time it prunes.

    Raises:
        UserError: The data module has no method for it, or too few windows.
    """
    require_turns(trainer, turn + 1)
    data: Any = trainer.datamodule
    trainer.lightning_module.check_length(length, "calibration windows")
    return data.calibration_batches(samples, length, batch_size, **({"turn": turn} if turn else {}))


def require_turns(trainer: Any, turns: int) -> None:
    """Refuse a data module without calibration windows, or with the same ones each time.

    Args:
        trainer: The trainer.
        turns: How many times they are drawn.

    Raises:
        UserError: It has no method for it, or one that draws once.
    """
    data: Any = getattr(trainer, "datamodule", None)
    if not hasattr(data, "calibration_batches"):
        raise UserError(
            "expected a data module with calibration_batches(samples, length, batch_size), "
            f"got {type(data).__name__}; use lit_prune.TextDataModule or add that method"
        )
    if turns > 1 and "turn" not in signature(data.calibration_batches).parameters:
        raise UserError(
            "expected calibration_batches with an argument turn for a method that draws anew in "
            f"each iteration, got {type(data).__name__}; add it, or set iterations to 1"
        )
