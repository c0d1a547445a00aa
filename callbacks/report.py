"""What was gained and lost: perplexity, size and speed, before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from lit_prune.errors import UserError
from lit_prune.evaluation.perplexity import perplexity
from lit_prune.evaluation.sizes import weight_bytes
from lit_prune.evaluation.speed import median_speed, throughput
from lit_prune.reporting.report import build_report, model_entry, print_report, write_report
from lit_prune.stages import StageCallback
from lit_prune.structure.counting import count_actual


class GainLossReport(StageCallback):
    """Measures the dense, the pruned and the recovered model, and writes ``report.json``.

    Perplexity is that of the data module's validation windows. Speed is that of a forward pass,
    the dense and the final model taking turns at the end. List it before the export, whose card
    shows the table.

    Args:
        file: Name of the report in the run's folder.
        rounds: Passes per model for the speed; 0 leaves it out.
        length: Tokens of such a pass.
    """

    def __init__(self, file: str = "report.json", rounds: int = 5, length: int = 512) -> None:
        if rounds < 0 or length < 1:
            raise UserError(
                f"expected rounds of at least 0 and length of at least 1, got {rounds} and {length}"
            )
        self.file, self.rounds, self.length = file, rounds, length
        super().__init__()
        self.notes: list[str] = []

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Refuse a module that has no model to measure."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.notes = []  # as with `models`

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far."""
        return {**super().state_dict(), "notes": self.notes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was measured before."""
        super().load_state_dict(state_dict)
        self.notes = state_dict["notes"]

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Measure the result, and write and print the report."""
        super().on_fit_end(trainer, pl_module)
        if self.rounds and trainer.is_global_zero:
            self._measure_speed(trainer, pl_module)
        pl_module.report = self._report(trainer, pl_module)
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            write_report(pl_module.report, folder / self.file)
            print_report(pl_module.report, folder, stock=pl_module.is_stock)

    def measure(self, trainer: Trainer, pl_module: Any, name: str) -> dict[str, Any]:
        """Perplexity and size of the model as it is."""
        model, structure = pl_module.model, pl_module.structure
        batches = list(_data(trainer).val_dataloader())[trainer.global_rank :: trainer.world_size]
        total, tokens = 0.0, 0
        if batches:
            text = f"perplexity of the {name} model" if trainer.is_global_zero else None
            result = perplexity(model, batches, progress=text)
            total, tokens = result.nll * result.tokens, result.tokens
        sums = torch.tensor([total, tokens], dtype=torch.float64, device=pl_module.device)
        sums = trainer.strategy.reduce(sums, reduce_op="sum")
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
        models = {"dense": dense, "final": pl_module.model}
        speeds = throughput(models, tokens, self.rounds)
        for name, entry in self.models.items():  # recovery leaves the pruned model's shapes
            speed = speeds["dense" if name == "dense" else "final"]
            entry["tokens_per_second"] = median_speed(speed)

    def _report(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        data = _data(trainer)
        last = pl_module.history[-1] if pl_module.history else {}
        speed = f"median of {self.rounds} forward passes of {self.length} tokens, taking turns"
        return build_report(
            protocol={
                **data.protocol(),
                "dtype": str(pl_module.model.dtype).removeprefix("torch."),
                "recovery_steps": trainer.global_step - pl_module.first_step,
                "recovery_batch": _batch(trainer, data),
                "speed": speed if self.rounds else "not measured",
                "threads": torch.get_num_threads(),
                "device": str(trainer.strategy.root_device),
            },
            sparsity=last.get("sparsity", {"target": 0.0, "decoder": 0.0, "total": 0.0}),
            models=self.models,
            seconds=pl_module.seconds,
            method=last.get("method", "none"),
            options=last.get("options"),
            warnings=[*last.get("warnings", []), *self.notes],
        )


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
