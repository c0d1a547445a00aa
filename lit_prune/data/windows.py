"""Cutting tokens into windows and rows: parts without overlap, data sets, batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_prune.data.tokens import Tokens
from lit_prune.errors import UserError

IGNORED = -100

Batch = dict[str, Tensor]


class Parts(NamedTuple):
    """Ranges of one source's tokens (or rows) that don't overlap."""

    train: range
    calibration: range
    validation: range


def split_parts(total: int, calibration_share: float, validation_share: float) -> Parts:
    """Cuts a source in three: train | calibration | validation.

    Args:
        total: Tokens, or rows.
        calibration_share: Share of what validation leaves.
        validation_share: Share of the whole.

    Returns:
        Ranges that follow one another and cover `range(total)`.
    """
    rest = total - round(total * validation_share)
    train = rest - round(rest * calibration_share)
    return Parts(range(train), range(train, rest), range(rest, total))


class WindowDataset(Dataset[Batch]):
    """Consecutive windows that don't overlap; an incomplete one at the end is dropped.

    Args:
        ids: Token ids of the source [tokens].
        span: The part of `ids` to cut.
        length: Tokens of a window.
    """

    def __init__(self, ids: Tensor, span: range, length: int) -> None:
        self.ids = ids
        self.span = span
        self.length = length

    def __len__(self) -> int:
        return len(self.span) // self.length

    def __getitem__(self, index: int) -> Batch:
        """Returns window `index`: input_ids, attention_mask and labels, int64 [length]."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = self.span.start + index * self.length
        ids = self.ids[start : start + self.length].long()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    @property
    def tokens(self) -> int:
        """Returns the number of tokens in all windows."""
        return len(self) * self.length


class RowDataset(Dataset[Batch]):
    """Instructions, one a row, the prompt masked out of the labels.

    Rows of which truncation leaves only the prompt are left out: nothing is to be learnt from them.

    Args:
        tokens: A source's tokens, with offsets and prompts.
        span: The part of the rows to take.
        length: A longer row is truncated to this.
        limit: Take rows from the start while they have this many tokens together; None takes all.
    """

    def __init__(self, tokens: Tokens, span: range, length: int, limit: int | None = None) -> None:
        if tokens.offsets is None or tokens.prompts is None:
            raise ValueError("expected tokens with offsets and prompts, got plain text")
        self.ids = tokens.ids
        self.offsets = tokens.offsets
        self.prompts = tokens.prompts
        self.length = length
        lengths = self.offsets.diff().clamp(max=length)
        chosen = torch.arange(span.start, span.stop, device="cpu")
        chosen = chosen[self.prompts[chosen] < lengths[chosen]]
        if limit is not None:
            within = int((lengths[chosen].cumsum(0) <= limit).sum())
            chosen = chosen[: max(within, 1)]
        self.rows = chosen
        self.tokens = int(lengths[chosen].sum())

    def __len__(self) -> int:
        return self.rows.numel()

    def __getitem__(self, index: int) -> Batch:
        """Returns row `index`: input_ids, attention_mask and labels, int64 [tokens of the row]."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = int(self.rows[index])
        start, end = int(self.offsets[row]), int(self.offsets[row + 1])
        ids = self.ids[start : min(end, start + self.length)].long()
        labels = ids.clone()
        labels[: int(self.prompts[row])] = IGNORED
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


TextDataset = WindowDataset | RowDataset


class EvenData(Dataset[Batch]):
    """A data set that processes can share evenly: rows that count for nothing are added to it.

    Lightning hands each process its share, and would otherwise give some rows twice, which would
    then count twice. All processes need the same number, since forward passes may wait for
    each other.

    Args:
        data: The data set, not empty.
        processes: How many share it.
    """

    def __init__(self, data: TextDataset, processes: int) -> None:
        self.data = data
        self.missing = -len(data) % processes

    def __len__(self) -> int:
        return len(self.data) + self.missing

    def __getitem__(self, index: int) -> Batch:
        """Returns row `index` of the data, or behind its end one of which no token is predicted."""
        if not len(self.data) <= index < len(self):
            return self.data[index]
        first = self.data[0]
        return {**first, "labels": torch.full_like(first["labels"], IGNORED)}


def cut(tokens: Tokens, span: range, length: int, limit: int | None = None) -> TextDataset:
    """Cuts a part into windows, or takes its rows.

    Args:
        tokens: Of the whole source.
        span: The part: tokens, or rows.
        length: Tokens of a window; rows are truncated to it.
        limit: Only so many tokens from the start; None takes all.

    Returns:
        The data set of the part.
    """
    if tokens.offsets is not None:
        return RowDataset(tokens, span, length, limit)
    return WindowDataset(tokens.ids, span[:limit], length)


def require_items(data: TextDataset, needed: int, *, part: str, name: str, option: str) -> None:
    """Refuses a part that is too short.

    Args:
        data: The part.
        needed: Windows or rows that it must have.
        part: What the part is for, in words.
        name: The source's name.
        option: The option that sets the window's length.

    Raises:
        UserError: There are fewer.
    """
    if len(data) >= needed:
        return
    if isinstance(data, RowDataset):
        wanted = f"rows with an answer within {data.length} tokens"
        got = f"{len(data)}"
    else:
        wanted = f"windows of {data.length} tokens"
        got = f"{len(data.span)} tokens, {len(data)} windows"
    raise UserError(
        f"expected at least {needed} {wanted} in the {part} part of {name}, got {got}; "
        f"give a longer text or a smaller {option}"
    )


class Collate:
    """Pads on the right to the longest of a batch.

    Args:
        pad_id: Token id of the padding; it is attended to by none and in no loss.
    """

    def __init__(self, pad_id: int) -> None:
        self.fill = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORED}

    def __call__(self, items: Sequence[Batch]) -> Batch:
        """Returns one batch of `items`: each entry int64 [batch, longest]."""
        return {
            name: torch.nn.utils.rnn.pad_sequence(
                [item[name] for item in items], batch_first=True, padding_value=fill
            )
            for name, fill in self.fill.items()
        }


def draw(count: int, available: int, seed: int) -> list[int]:
    """Draws indices without replacement, the same for a seed everywhere.

    Args:
        count: How many.
        available: Indices are below this.
        seed: Of the generator.

    Returns:
        `count` different indices in random order.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(available, generator=generator)[:count].tolist()
