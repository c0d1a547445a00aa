"""What a pruning method gets to work with: the model, its structure and calibration tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from typing import Any

from torch import Tensor, nn

from lit_prune.calibration import Stream
from lit_prune.errors import UserError
from lit_prune.layerwise import Ranks, dense_statistics
from lit_prune.progress import track
from lit_prune.statistics import InputStatistics
from lit_prune.structure.counting import unique_labels
from lit_prune.structure.model import Label, Structure

Batch = Mapping[str, Tensor]


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
    seed: int = 0
    title: str = "pruning"
    shown: bool = False

    def track(self, text: str) -> Callable[[Any], Iterator[Any]]:
        """Wraps what it is given in a progress bar.

        Args:
            text: What is being done.
        """
        return lambda items: track(items, f"{self.title}: {text}", self.shown)

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

    def reader(self, layer: int, axis: str) -> nn.Module:
        """The module of a layer that reads an axis."""
        return self.model.get_submodule(self.structure.readers(self.model, axis, layer)[0].path)


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
    data: Any = getattr(trainer, "datamodule", None)
    if not hasattr(data, "calibration_batches"):
        raise UserError(
            "expected a data module with calibration_batches(samples, length, batch_size), "
            f"got {type(data).__name__}; use lit_prune.TextDataModule or add that method"
        )
    trainer.lightning_module.check_length(length, "calibration windows")
    redrawn = {"turn": turn} if turn else {}
    if redrawn and "turn" not in signature(data.calibration_batches).parameters:
        raise UserError(
            "expected calibration_batches with an argument turn for a method that draws anew in "
            f"each iteration, got {type(data).__name__}; add it, or set iterations to 1"
        )
    return data.calibration_batches(samples, length, batch_size, **redrawn)
