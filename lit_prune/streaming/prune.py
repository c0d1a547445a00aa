"""Pruning a model larger than memory: from files to files, one layer at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_prune.calibration.calibration import Batch, Calibration
from lit_prune.calibration.moments import layer_statistics
from lit_prune.calibration.statistics import InputStatistics, require_finite
from lit_prune.calibration.stream import Stream
from lit_prune.cutting.callback import sizes_of
from lit_prune.errors import UserError
from lit_prune.export.checkpoint import export_folder, write_export
from lit_prune.export.describe import card_of, widths_summary
from lit_prune.heap import keep_large_blocks_apart
from lit_prune.loading import opening
from lit_prune.module import PrunableLM
from lit_prune.notes import noting
from lit_prune.pruning import PruningCallback
from lit_prune.streaming.shards import ShardWriter
from lit_prune.streaming.shelf import Shelf, build_empty
from lit_prune.structure import settle


def prune_streaming(
    module: PrunableLM, callback: PruningCallback, data: Any, out: str | Path, *, shown: bool = True
) -> dict[str, Any]:
    """Prune a checkpoint into another one; no more than a layer of either is ever in memory.

    What the method does to a layer is what it does in a fit, and so is the result, to the bit. Of
    the calibration windows the hidden states stay in memory, and while a layer is pruned one Gram
    matrix where the method needs one.

    Args:
        module: Says what is pruned and how it is read; its model is not loaded.
        callback: The method, with its options.
        data: A data module with `calibration_batches`.
        out: The folder to make; a new one.
        shown: Whether to show progress.

    Returns:
        `sparsity` (target, decoder and total), `widths` (axis -> dense and kept), `stock` and
        `seconds` of calibration and pruning.

    Raises:
        UserError: The method needs more than a layer, or the source or `out` is unfit.
    """
    require_layers_suffice(callback)
    out = Path(out).expanduser()
    if out.is_symlink() or out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"expected a new folder to write, got {out}, which exists; choose another")
    keep_large_blocks_apart()
    model, files = build_empty(
        module.pretrained,
        dtype=module.dtype_name,
        attn_implementation=module.attn_implementation,
        access=module.access,
    )
    opening.take(module, model)
    shelf = Shelf(model, module.structure, files)
    trainer = _Alone(data, module)
    data.trainer = trainer
    callback.restart()
    callback.original = sizes_of(module)
    callback.prepare(trainer, module)  # pyright: ignore[reportArgumentType]
    batches = callback.draw(trainer)
    with export_folder(model, out) as folder:
        writer = ShardWriter(folder)
        calibration = StreamedCalibration(module, callback, batches, shelf, writer, shown=shown)
        _prune(module, callback, calibration, trainer)
        stock = write_export(
            model,
            module.tokenizer,
            folder,
            config=model.config,
            layout=module.layout.to_dict(),
            lineage=[*module.lineage, *module.history],
            card=card_of(module, out.resolve().name),
            weights=False,
        )
        for tensors in shelf.outside(stock=stock):
            _write(writer, tensors)
        writer.finish()
    return {
        "sparsity": module.history[-1]["sparsity"],
        "widths": widths_summary(module.layout),
        "stock": module.is_stock,
        "seconds": module.seconds["calibrate_and_prune"],
    }


def require_layers_suffice(callback: PruningCallback) -> None:
    """Refuse what one layer at a time is not enough for.

    Args:
        callback: The method.

    Raises:
        UserError: It needs more.
    """
    reason = None
    if callback.columns is None and not callback.by_layer:
        reason = f"the scores of {callback.method} take the whole model, mostly for its loss"
    elif callback.allocation == "sensitivity":
        reason = "the sensitivity allocation takes the whole model's loss"
    elif "hidden" in callback.axes:
        reason = "the axis hidden runs through all layers"
    elif callback.smoothing:
        reason = "smoothing scores the whole model batch by batch"
    elif callback.last_step or callback.iterations > 1:
        reason = "start and iterations are of a model that trains or was cut before"
    if reason is not None:
        raise UserError(
            f"expected a method that needs one layer at a time, got one that needs more: {reason}; "
            "choose another, or prune in memory with lit-prune fit"
        )


def _prune(
    module: PrunableLM, callback: PruningCallback, calibration: StreamedCalibration, trainer: _Alone
) -> None:
    """Prune and write all layers, and note down what was done."""
    start = time.perf_counter()
    with noting() as notes:
        layout = callback.prune(calibration, callback.target(module))
    module.is_stock = settle(module.model, module.structure, layout)
    module.layout = module.layout.then(layout)
    module.phase = "pruned"
    module.seconds["calibrate_and_prune"] = time.perf_counter() - start
    callback.iteration, callback.finished = 1, True
    present = sizes_of(module)
    reached = {key: 1 - number / callback.original[key] for key, number in present.items()}
    callback._record(trainer, module, reached, notes)  # pyright: ignore[reportArgumentType]


def _write(writer: ShardWriter, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors that are numbers, as `Prunable.export` does.

    Raises:
        UserError: One is NaN or infinite.
    """
    for name, tensor in tensors.items():
        require_finite(tensor, "weights", f"in {name}")
    writer.add(tensors)


@dataclass
class _Alone:
    """What methods and data ask of a trainer, where there is none."""

    datamodule: Any
    lightning_module: Any
    loggers: Sequence[Any] = ()
    global_rank: int = 0
    world_size: int = 1
    max_steps: int = 0


class StreamedCalibration(Calibration):
    """A calibration whose model has the weights of one layer at a time.

    Args:
        module: Has the model, on meta.
        callback: The method.
        batches: Calibration batches.
        shelf: Where layers come from.
        writer: Where pruned ones go.
        shown: Whether to show progress.
    """

    def __init__(
        self,
        module: PrunableLM,
        callback: PruningCallback,
        batches: Sequence[Batch],
        shelf: Shelf,
        writer: ShardWriter,
        *,
        shown: bool,
    ) -> None:
        super().__init__(
            module.model,
            module.structure,
            batches,
            callback.axes,
            seed=callback.seed,
            title=callback.method,
            shown=shown,
        )
        self.shelf, self.writer = shelf, writer

    def track(self, text: str, *, changes: bool = False) -> Callable[[Any], Iterator[int]]:
        """Goes over the layers in a progress bar; each has weights while it is given.

        Args:
            text: What is being done.
            changes: Whether they are written as they are left; else they stay as they were.
        """
        bar = super().track(text)

        def layers(numbers: Any) -> Iterator[int]:
            for layer in bar(numbers):
                self.shelf.take(layer)
                yield layer
                if changes:
                    _write(self.writer, self.shelf.tensors(layer))
            self.shelf.put_back()

        return layers

    def layers(self) -> Iterator[int]:
        """The layers in turn; each has weights while it is given."""
        return self.track("scores")(range(len(self.structure.widths.layers)))

    def stream(self, batches: Sequence[Batch] | None = None) -> Stream:
        """The batches' hidden states before the first layer.

        Args:
            batches: Others than the calibration batches.
        """
        with self.shelf.entrance():
            stream = super().stream(batches)
        stream.entrance = partial(self.shelf.entrance, first=False)
        return stream

    @cached_property
    def moments(self) -> dict[tuple[int, str], InputStatistics]:
        """Mean and variance of the readers' inputs in the dense model, taken when asked for."""
        return _Moments(self)


class _Moments(dict[tuple[int, str], InputStatistics]):
    """Statistics of each layer's inputs, taken while its weights are in memory, in one pass."""

    def __init__(self, calibration: StreamedCalibration) -> None:
        super().__init__()
        self._calibration, self._next = calibration, 0
        self._stream: Stream | None = calibration.stream()

    def __missing__(self, key: tuple[int, str]) -> InputStatistics:
        own, (layer, axis) = self._calibration, key
        if layer != self._next or self._stream is None:
            raise RuntimeError(f"expected to be asked for layer {self._next}, got {layer}")
        found = layer_statistics(
            own.model, own.structure, self._stream, layer, own.axes, ranks=own.ranks
        )
        self.update({(layer, name): statistics for name, statistics in found.items()})
        self._next += 1
        if self._next == len(own.structure.widths.layers):
            self._stream = None  # the hidden states are not needed any more
        return self[layer, axis]
