"""Zero-shot and few-shot tasks in a fit."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist
from lightning.pytorch import Trainer

from lit_prune.errors import UserError
from lit_prune.evaluation.tasks import check_options, evaluate_tasks, merged, task_names
from lit_prune.fitting.refit import check_strategy
from lit_prune.fitting.stages import StageCallback

#: How long a process waits for one with a slower task; a process that dies is noticed at once.
_PATIENCE = timedelta(days=7)


class TaskEvaluation(StageCallback):
    """Evaluates the dense, the pruned and the recovered model on tasks of lm-eval.

    Results are for the report: list it before `GainLossReport`. Several processes share the tasks.
    The fit goes on as if nothing had been evaluated.

    Args:
        tasks: lm-eval's names of tasks or groups, or ``papers`` for those of the papers.
        data: A folder with jsonl files, one per task; without it the hub's data.
        limit: Only the first items of each task.
        fewshot: Examples before each item; by default the task's own number.
        batch_size: Requests in a forward pass.
    """

    def __init__(
        self,
        tasks: str | list[str] = "papers",
        data: str | None = None,
        limit: int | None = None,
        fewshot: int | None = None,
        batch_size: int = 8,
    ) -> None:
        super().__init__()
        self.tasks = tasks
        self.options: dict[str, Any] = {
            "data": data,
            "limit": limit,
            "fewshot": fewshot,
            "batch_size": batch_size,
        }
        check_options(**self.options)
        self.names: list[str] = []
        self._group: Any = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Refuse what would fail only after hours of work.

        Raises:
            UserError: A task is unknown, lm-eval is not installed, there is no folder with data,
                the strategy has no process that holds the whole model, or the report is written
                before the last model is evaluated.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._group = None  # of an earlier fit
            self._check_order(trainer)
            check_strategy(type(trainer.strategy))
            check_options(**self.options)
            self.names = task_names(self.tasks)

    def _check_order(self, trainer: Trainer) -> None:
        listed: list[Any] = cast(Any, trainer).callbacks
        before = listed[: listed.index(self)] if self in listed else []
        for callback in before:
            if getattr(callback, "reports", False):
                raise UserError(
                    f"expected TaskEvaluation before {type(callback).__name__}, got it after; list "
                    "it earlier, or the report lacks the recovered model's tasks"
                )

    def measure(self, trainer: Trainer, pl_module: Any, name: str) -> dict[str, Any]:
        """Evaluate the model as it is, each process some of the tasks."""
        parts: list[dict[str, Any]] = []
        world, rank = trainer.world_size, trainer.global_rank
        text = f"of the {name} model" if trainer.is_global_zero else False
        for start in range(0, len(self.names), world):  # in turns, so that none waits for long
            own = self.names[start + rank : start + rank + 1]
            part = self._evaluate(pl_module, own, text)
            turn = self._gathered(part, world)
            errors = [part for part in turn if isinstance(part, str)]
            if errors:
                raise UserError(errors[0])
            parts += [part for part in turn if part]
        result = merged(parts)
        pl_module.findings.setdefault("tasks", {})[name] = result
        return result

    def _gathered(self, part: Any, world: int) -> list[Any]:
        """All processes' parts; the strategy's own collectives give up after half an hour."""
        if world == 1:
            return [part]
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        turn: list[Any] = [None] * world
        dist.all_gather_object(turn, part, group=self._group)
        return turn

    def _evaluate(self, pl_module: Any, names: list[str], text: str | bool) -> Any:
        """Results, nothing where there is no task left, or what is wrong."""
        if not names:
            return None
        try:
            return evaluate_tasks(
                pl_module.model, pl_module.tokenizer, names, progress=text, **self.options
            )
        except UserError as error:  # the others wait for this process
            return str(error)
