"""How well a model predicts a text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lit_prune.errors import UserError
from lit_prune.modes import evaluating
from lit_prune.progress import track

IGNORED = -100
# Entries of a float32 block: 16 MB. Smaller ones are hardly faster, and on a busy machine threads
# wait for each other at each operation.
_BLOCK_CPU, _BLOCK_GPU = 2**22, 2**24


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a text.

    Attributes:
        value: exp(nll).
        tokens: Number of predicted tokens.
        nll: Mean negative log-likelihood of a predicted token, in nats.
    """

    value: float
    tokens: int
    nll: float


def predicted_tokens(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Positions whose logits predict a token that counts.

    Position t predicts the label of t + 1; it counts if that label isn't -100.

    Args:
        labels: Unshifted labels [batch, length], -100 = ignored.

    Returns:
        Rows [predicted] of logits flattened to [batch * length, vocab], and the labels they
        predict [predicted].
    """
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).reshape(-1)
    rows = (targets != IGNORED).nonzero().squeeze(1)
    return rows, targets[rows]


def block_rows(width: int, device: torch.device) -> int:
    """Rows of `width` entries whose float32 copy is small on a device."""
    return max(1, (_BLOCK_CPU if device.type == "cpu" else _BLOCK_GPU) // width)


def row_blocks(rows: Tensor, height: int) -> Iterator[tuple[slice, slice]]:
    """Consecutive rows, so that a block of the logits is a view and no copy.

    Args:
        rows: Ascending row numbers [rows].
        height: Most rows of a block.

    Yields:
        The block's slice of the flattened logits, and its slice of `rows`.
    """
    rows = rows.cpu()
    breaks = ((rows.diff() != 1).nonzero().squeeze(1) + 1).tolist()
    for begin, end in zip([0, *breaks], [*breaks, len(rows)], strict=True):
        for start in range(begin, end, height):
            size = min(height, end - start)
            first = int(rows[start])
            yield slice(first, first + size), slice(start, start + size)


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each predicted token, without a float32 copy of all logits.

    Args:
        logits: [batch, length, vocab], any floating dtype.
        labels: Unshifted labels [batch, length], -100 = ignored.

    Returns:
        Nats [predicted], float32 (float64 for float64 logits).
    """
    width = logits.shape[-1]
    flat = logits.reshape(-1, width)
    rows, targets = predicted_tokens(labels)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    nll = torch.empty(len(rows), dtype=dtype, device=logits.device)
    height = min(block_rows(width, logits.device), max(len(rows), 1))
    # Buffers used again: fresh ones would cost a page fault for every 4 kB of every block.
    buffers = torch.empty(2, height, width, dtype=dtype, device=logits.device)
    for block, part in row_blocks(rows, height):
        values, log_p = buffers[:, : part.stop - part.start]
        torch.log_softmax(values.copy_(flat[block]), 1, out=log_p)
        nll[part] = -log_p.gather(1, targets[part, None]).squeeze(1)
    return nll


class TokenPerplexity(Metric):
    """Perplexity over all predicted tokens of all batches and ranks.

    Updated with (logits [batch, length, vocab], unshifted labels [batch, length]); the value is
    exp(sum of nats / predicted tokens), NaN before the first token. Unlike torchmetrics' own
    `Perplexity` it makes no float32 copy of all logits, shifts the labels as Hugging Face does,
    and keeps its float64 sum when the module that holds it is cast to bfloat16.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        """Start from zero tokens.

        Args:
            **kwargs: Arguments of `torchmetrics.Metric`.
        """
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            logits: [batch, length, vocab].
            labels: Unshifted labels [batch, length], -100 = ignored.
        """
        nll = token_nll(logits.detach(), labels)
        # not in place: states that were made under inference mode can't be changed outside it
        self.total = self.total + nll.double().sum()
        self.count = self.count + nll.numel()

    def compute(self) -> Tensor:
        """Perplexity so far [], float64."""
        return torch.exp(self.total / self.count)

    def _apply(self, fn: Any, exclude_state: Sequence[str] = "") -> nn.Module:
        # `module.to(bfloat16)` casts a metric's states too (torchmetrics guards only .bfloat16()).
        dtypes = {name: getattr(self, name).dtype for name in self._defaults}
        module = super()._apply(fn, [*exclude_state, *self._defaults])
        device = fn(torch.zeros(1, device=self.total.device)).device
        for name, dtype in dtypes.items():
            setattr(self, name, getattr(self, name).to(device, dtype))
            self._defaults[name] = cast(Tensor, self._defaults[name]).to(device, dtype)
        return module


def perplexity(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, progress: str | None = None
) -> Perplexity:
    """Perplexity of a text: exp of the mean negative log-likelihood of its predicted tokens.

    The mean is over the tokens of all batches, not over batches; padding and label -100 don't
    count. Evaluated in eval mode without gradients; the former mode is restored. Padding must be
    on the right, as the models derive positions from the index.

    Args:
        model: A causal LM of transformers.
        batches: Dicts with `input_ids`, `labels` and optionally `attention_mask` [batch, length].
        progress: What a progress bar on stderr says; None for silence.

    Returns:
        The perplexity, number of predicted tokens and mean nats.

    Raises:
        UserError: No token is predicted, or, as a `NotFiniteError`, a batch's loss is NaN or
            infinite.
    """
    device = next(model.parameters()).device
    total, count = 0.0, 0
    with evaluating(model), torch.no_grad():
        for index, batch in enumerate(track(batches, progress or "", progress is not None)):
            inputs = {
                name: batch[name].to(device)
                for name in ("input_ids", "attention_mask")
                if batch.get(name) is not None
            }
            logits = model(**inputs, use_cache=False).logits
            nll = token_nll(logits, batch["labels"].to(logits.device))
            value = nll.cpu().double().sum().item()  # not every device has float64
            _require_finite(value, index, progress)
            total, count = total + value, count + nll.numel()
    if not count:
        raise UserError(
            "expected at least one token to predict, got none (all labels ignored or no batch); "
            "give a longer text or shorter windows"
        )
    mean = total / count
    return Perplexity(value=math.exp(mean) if mean < 700 else math.inf, tokens=count, nll=mean)


class NotFiniteError(UserError):
    """A loss is NaN or infinite."""


def _require_finite(value: float, index: int, progress: str | None) -> None:
    """Refuse a NaN or infinite loss."""
    if math.isfinite(value):
        return
    kind = "NaN" if math.isnan(value) else "an infinite value"
    where = f" of '{progress}'" if progress else ""
    raise NotFiniteError(
        f"expected a finite loss, got {kind} in evaluation batch {index}{where}; "
        "check the weights, or evaluate in bfloat16 or float32 instead of float16"
    )
