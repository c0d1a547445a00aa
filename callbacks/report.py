"""What was gained and lost: perplexity, size and speed, before and after."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Trainer

from lit_prune.errors import UserError
from lit_prune.evaluation.perplexity import IGNORED, perplexity
from lit_prune.evaluation.sizes import weight_bytes
from lit_prune.evaluation.speed import throughput
from lit_prune.export.describe import layer_widths
from lit_prune.fitting.stages import StageCallback
from lit_prune.memory import fits
from lit_prune.reporting.card import public_name
from lit_prune.reporting.configuration import run_config
from lit_prune.reporting.curves import Points, add_values, fresh
from lit_prune.reporting.html import write_html
from lit_prune.reporting.report import (
    MODELS,
    build_report,
    model_entry,
    print_report,
    speed_entry,
    write_report,
)
from lit_prune.reporting.samples import PROMPTS, continuations
from lit_prune.structure.counting import count_actual


class GainLossReport(StageCallback):
    """Measures the dense, the pruned and the recovered model, and writes the run's report.

    Perplexity is that of the data module's validation windows. Speed is that of a forward pass,
    the dense and the final model taking turns at the end. What the fit logs becomes curves. List it
    before the export, whose card shows the table.

    Args:
        file: Name of the report in the run's folder; beside it lies a page of the same name.
        rounds: Passes per model for the speed; 0 leaves it out.
        length: Tokens of such a pass.
        prompts: Texts that each model goes on with; three by default, none for an empty list.

    Attributes:
        reports: That what other callbacks find must be there before this one's turn.
    """

    reports = True

    def __init__(
        self,
        file: str = "report.json",
        rounds: int = 5,
        length: int = 512,
        prompts: list[str] | None = None,
    ) -> None:
        if rounds < 0 or length < 1:
            raise UserError(
                f"expected rounds of at least 0 and length of at least 1, got {rounds} and {length}"
            )
        if Path(file).suffix == ".html":
            raise UserError(f"expected another suffix than that of the page, got {file}; use .json")
        if not all(prompts or []):
            raise UserError("expected prompts with text, got an empty one; leave it out")
        self.file, self.rounds, self.length = file, rounds, length
        self.prompts = list(PROMPTS if prompts is None else prompts)
        super().__init__()
        self._forget()

    def _forget(self) -> None:
        #: What a reader of the figures should know.
        self.notes: list[str] = []
        #: What was logged, by metric, and what models wrote, by name and prompt.
        self.curves: Points = {}
        self.texts: dict[str, dict[str, str]] = {}
        self._held: Mapping[str, Any] | None = None
        self._passes: str | None = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Refuse a module that has no model to measure."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._forget()  # as with `models`

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far."""
        own = {"notes": self.notes, "curves": self.curves, "texts": self.texts}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was measured before."""
        super().load_state_dict(state_dict)
        self.notes = state_dict["notes"]
        self.curves, self.texts = state_dict.get("curves", {}), state_dict.get("texts", {})

    # --- curves --------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hold on to what was logged before, if this step's values shall be kept."""
        every = cast(Any, trainer).log_every_n_steps
        self._held = None
        if every and (_step(trainer) + 1) % every == 0:
            self._held = dict(trainer.logged_metrics)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep this step's values; a checkpoint that is saved after it has them."""
        if self._held is not None and not trainer.fit_loop._should_accumulate():
            add_values(self.curves, _step(trainer), fresh(self._held, trainer.logged_metrics))
        self._held = None

    def on_after_cut(self, trainer: Trainer, pl_module: Any) -> None:
        """Note how much is gone, and measure the model after the last cut."""
        reached = pl_module.history[-1].get("sparsity", {}) if pl_module.history else {}
        if "decoder" in reached:
            values = {"prune/sparsity": reached["decoder"]}
            add_values(self.curves, trainer.global_step, values)
        super().on_after_cut(trainer, pl_module)

    # --- figures -------------------------------------------------------------------------------

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Measure the result, and write and print the report."""
        super().on_fit_end(trainer, pl_module)
        if self.rounds and trainer.is_global_zero:
            self._measure_speed(trainer, pl_module)
        pl_module.report = self._report(trainer, pl_module)
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            page = (folder / self.file).with_suffix(".html")
            write_report(pl_module.report, folder / self.file)
            write_html(pl_module.report, page)
            print_report(pl_module.report, folder, stock=pl_module.is_stock, page=page)

    def measure(self, trainer: Trainer, pl_module: Any, name: str) -> dict[str, Any]:
        """Perplexity and size of the model as it is."""
        model, structure = pl_module.model, pl_module.structure
        batches = list(_data(trainer).val_dataloader())[trainer.global_rank :: trainer.world_size]
        # a data module may have added some that only even out the processes' shares
        batches = [batch for batch in batches if (batch["labels"] != IGNORED).any()]
        total, tokens = 0.0, 0
        if batches:
            text = f"perplexity of the {name} model" if trainer.is_global_zero else None
            result = perplexity(model, batches, progress=text)
            total, tokens = result.nll * result.tokens, result.tokens
        sums = torch.tensor([total, tokens], dtype=torch.float64, device=pl_module.device)
        sums = trainer.strategy.reduce(sums, reduce_op="sum")
        if self.prompts and pl_module.tokenizer is not None:
            alone = trainer.is_global_zero  # the model is whole on each process
            texts = continuations(model, pl_module.tokenizer, self.prompts) if alone else {}
            self.texts[name] = trainer.strategy.broadcast(texts)
        return model_entry(
            perplexity=float((sums[0] / sums[1]).exp()),
            parameters=count_actual(model, structure),
            decoder_parameters=count_actual(model, structure, decoder=True),
            weight_bytes=weight_bytes(model),
        )

    def _measure_speed(self, trainer: Trainer, pl_module: Any) -> None:
        try:
            dense = pl_module.require_teacher()
        except UserError as error:  # such as a model given in memory whose dense form is gone
            self.notes.append(f"speed was not measured: {error}")
            return
        tokens = next(iter(_data(trainer).val_dataloader()))["input_ids"][:1, : self.length]
        models, speeds = {"dense": dense, "final": pl_module.model}, {}
        if not fits(lambda: speeds.update(throughput(models, tokens, self.rounds))):
            self.notes.append("speed was not measured: memory ran out with both models in it")
            return
        self._passes = f"median of {self.rounds} forward passes of {tokens.numel()} tokens"
        for name, entry in self.models.items():  # recovery leaves the pruned model's shapes
            entry |= speed_entry(speeds["dense" if name == "dense" else "final"])

    # --- the report ----------------------------------------------------------------------------

    def _report(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        data = _data(trainer)
        last = pl_module.history[-1] if pl_module.history else {}
        speed = f"{self._passes} (least to most), taking turns" if self._passes else None
        return build_report(
            protocol={
                **data.protocol(),
                "dtype": str(pl_module.model.dtype).removeprefix("torch."),
                "recovery_steps": trainer.global_step - pl_module.first_step,
                "recovery_batch": _batch(trainer, data),
                "speed": speed or "not measured",
                "threads": torch.get_num_threads(),
                "device": str(trainer.strategy.root_device),
            },
            sparsity=last.get("sparsity", {"target": 0.0, "decoder": 0.0, "total": 0.0}),
            models=self.models,
            seconds=pl_module.seconds,
            method=last.get("method", "none"),
            options=last.get("options"),
            warnings=[*last.get("warnings", []), *self.notes],
            details=self._details(trainer, pl_module),
        )

    def _details(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        """What the page shows beside the table."""
        seed = os.environ.get("PL_GLOBAL_SEED")  # where `seed_everything` leaves it
        return {
            "pretrained": public_name(pl_module.pretrained),
            "stock": pl_module.is_stock,
            "seed": int(seed) if seed else None,
            "layers": layer_widths(pl_module.layout),
            "curves": self.curves,
            "findings": pl_module.findings,
            "generations": [
                {"prompt": prompt}
                | {m: self.texts[m][prompt] for m in MODELS if prompt in self.texts.get(m, {})}
                for prompt in (self.prompts if self.texts else [])
            ],
            "config": run_config(trainer),
        }


def _step(trainer: Trainer) -> int:
    """The step whose number loggers get with what is logged now."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _batch(trainer: Trainer, data: Any) -> str:
    """Windows and tokens of an optimizer step, as far as a data module tells."""
    if not hasattr(data, "batch_size") or not hasattr(data, "length"):
        return "unknown"
    turns = trainer.world_size * trainer.accumulate_grad_batches
    return f"{data.batch_size * turns} x {data.length}"


def _data(trainer: Trainer) -> Any:
    data: Any = getattr(trainer, "datamodule", None)
    if not hasattr(data, "protocol"):
        raise UserError(
            "expected a data module with protocol() for the report, got "
            f"{type(data).__name__}; use lit_prune.TextDataModule or add that method"
        )
    return data
