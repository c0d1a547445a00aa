"""A model in memory as lm-eval sees it; the process and the model stay as they were."""

from __future__ import annotations

import copy
import io
import logging
import math
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from typing import Any, cast

import lm_eval
import numpy as np
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from torch import nn

from lit_prune.errors import UserError
from lit_prune.modes import evaluating
from lit_prune.progress import track

#: lm-eval's own, of its command line.
SEED = 1234
VERSION = lm_eval.__version__

_HFLM: Any = HFLM  # its decorator hides its type


def run(
    model: nn.Module,
    tokenizer: Any,
    tasks: Mapping[str, Any],
    groups: Mapping[str, Any],
    *,
    limit: int | None,
    batch_size: int,
    progress: str | None,
) -> tuple[dict[str, Any], int]:
    """Evaluate a model that is in memory, as lm-eval does, and leave it and the process as is.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        tasks: lm-eval's tasks, by name.
        groups: Its groups of them.
        limit: Items of each task, or None for all.
        batch_size: Requests in a forward pass.
        progress: What a progress bar on stderr says; None for silence.

    Returns:
        lm-eval's results, and the number of requests that were cut off on the left because the
        model's context is too short.

    Raises:
        UserError: A log-likelihood is NaN, or an answer is longer than the model's context.
    """
    found: dict[str, Any] = {"tasks": tasks, "groups": groups}
    with quiet() as stderr, evaluating(model):
        lm = _HeldModel(model, tokenizer, batch_size, progress, stderr)
        results: Any = evaluate(lm, found, limit=limit, log_samples=False)  # pyright: ignore
    return results, lm.truncated


class _AsItIs:
    """A model that lm-eval calls, but does not put into a mode or tie anew."""

    def __init__(self, model: nn.Module) -> None:
        self._held = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._held, name)

    def __call__(self, input_ids: torch.Tensor) -> Any:
        return self._held(input_ids=input_ids, use_cache=False)


class _HeldModel(_HFLM):
    """lm-eval's adapter for a model in memory, with a progress bar and checks of its own.

    Attributes:
        truncated: Requests that were longer than the model's context.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, batch_size: int, progress: str | None, stderr: Any
    ) -> None:
        super().__init__(
            pretrained=_AsItIs(model),
            tokenizer=copy.deepcopy(tokenizer),  # it may get a padding token
            backend="causal",
            batch_size=batch_size,
        )
        self.truncated = 0
        self._text, self._stderr = progress, stderr

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Answer requests under a progress bar."""
        with self._ticking(len(requests)):
            return super().loglikelihood(requests, disable_tqdm=True)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Answer requests under a progress bar."""
        with self._ticking(len(requests)):
            return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        most = self.max_length
        for pair, context, tokens in requests:
            if len(tokens) > most:
                answer = pair[1] if pair else ""  # a window of a rolling text has none
                raise UserError(
                    f"expected answers of at most {most} tokens, the model's context, got one of "
                    f"{len(tokens)}: {answer.strip()[:40]!r}"
                )
            self.truncated += len(context) + len(tokens) > most + 1
        found = super()._loglikelihood_tokens(requests, *args, **kwargs)
        if any(math.isnan(value) for value, _ in found):
            raise UserError(
                "expected finite log-likelihoods, got NaN; check the weights, or evaluate in "
                "bfloat16 or float32 instead of float16"
            )
        return found

    @contextmanager
    def _ticking(self, total: int) -> Iterator[None]:
        """Move a bar on with each answer, which lm-eval hands to its cache hook."""
        with redirect_stderr(self._stderr):
            ticks = track(range(total), self._text or "", self._text is not None)
            with closing(cast(Any, ticks)):
                self.set_cache_hook(_Ticks(ticks))
                yield
                for _ in ticks:
                    pass


class _Ticks:
    """Stands where lm-eval would write answers into a cache."""

    def __init__(self, ticks: Iterator[Any]) -> None:
        self._ticks = ticks

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        next(self._ticks, None)


@contextmanager
def quiet() -> Iterator[Any]:
    """Hold back what lm-eval and its libraries print and log; yields the former stderr."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers")]
    levels = [logger.level for logger in loggers]
    stderr = sys.stderr
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield stderr
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def own_numbers(model: nn.Module) -> Iterator[None]:
    """Seed all random numbers as lm-eval does, and put their states back afterwards."""
    gpus = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    python, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(gpus):
        random.seed(0)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)
