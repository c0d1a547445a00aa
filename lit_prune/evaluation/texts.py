"""Perplexity of a text by name, in windows of a length and stride of one's choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lit_prune.data.sources import Source, read_source
from lit_prune.data.tokens import check_vocabulary, tokenize
from lit_prune.errors import UserError
from lit_prune.evaluation.perplexity import IGNORED, NotFiniteError, perplexity
from lit_prune.notes import note

#: Tokens of a batch of windows, as far as windows are shorter.
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class NamedText:
    """A text that papers report on, as they read it from the hub.

    Attributes:
        path: Data set.
        config: Its configuration.
        split: Its split.
        field: Where a record has its text.
        joint: What stands between records.
        options: Further arguments of `datasets.load_dataset`.
        records: Only so many from the start.
    """

    path: str
    config: str | None
    split: str
    field: str
    joint: str
    options: dict[str, Any]
    records: int | None = None


def _penn_treebank(split: str, joint: str) -> NamedText:
    """The data set is a script, which datasets no longer runs; the hub keeps its tables."""
    files = {split: f"penn_treebank/{split}/*.parquet"}
    options = {"revision": "refs/convert/parquet", "data_files": files}
    return NamedText("ptb-text-only/ptb_text_only", None, split, "sentence", joint, options)


#: As papers' code reads them. `ptb` is that of GPTQ and SparseGPT, `ptb-validation` that of
#: LLM-Pruner and of those that take its figures. Of C4, the code of SparseGPT and Wanda joins the
#: same 1,100 records, but measures only their first 256 windows: 524,288 tokens of windows of
#: 2,048, which `tokens` gives; here, all tokens of the records count unless it is given.
NAMED = {
    "wikitext2": NamedText("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text", "\n\n", {}),
    "ptb": _penn_treebank("test", " "),
    "ptb-validation": _penn_treebank("validation", "\n\n"),
    "c4": NamedText(
        "allenai/c4",
        None,
        "validation",
        "text",
        " ",
        {"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}},
        records=1100,
    ),
}


def read_text(name: str, field: str = "text") -> Source:
    """Read a text that a model shall be measured on.

    Args:
        name: ``wikitext2``, ``ptb``, ``ptb-validation``, ``c4``, or a source as of
            `lit_prune.data.sources.locate`.
        field: The field of records that holds the text.

    Returns:
        The text; one of `NAMED` is a single document.

    Raises:
        UserError: It can't be read.
    """
    if name not in NAMED:
        return read_source(name, field=field, split="test")
    text = NAMED[name]
    import datasets

    try:
        rows = datasets.load_dataset(text.path, text.config, split=text.split, **text.options)
    except Exception as error:  # whatever the hub or the network raises, the user gets one line
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"expected the text {name} ({text.path}) on the hub, got: {reason}; give a local file, "
            "such as --texts '[my.txt]'"
        ) from error
    records: Any = rows[text.field]
    return Source(name, [text.joint.join(records[: text.records])], split=text.split)


def windows(ids: Tensor, window: int, stride: int) -> list[dict[str, Tensor]]:
    """Overlapping windows in which every token is predicted once at most.

    The first window predicts all of its tokens but the first; each further one those that the
    window before it did not hold. An incomplete window at the end is left out.

    Args:
        ids: Tokens [tokens].
        window: Tokens of a window.
        stride: Tokens between starts of windows, at most `window`.

    Returns:
        Batches of `input_ids` and `labels`, int64 [batch, window].
    """
    if ids.numel() < window:
        return []
    inputs = ids.long().unfold(0, window, stride).clone()
    labels = inputs.clone()
    labels[1:, : window - stride] = IGNORED
    size = max(1, _BATCH_TOKENS // window)
    pairs = zip(inputs.split(size), labels.split(size), strict=True)
    return [{"input_ids": one, "labels": other} for one, other in pairs]


def text_perplexity(
    model: nn.Module,
    tokenizer: Any,
    source: Source,
    *,
    window: int = 2048,
    stride: int | None = None,
    tokens: int | None = None,
    progress: str | None = None,
) -> dict[str, Any]:
    """Perplexity of a text with all that is needed to measure it again.

    Args:
        model: A causal LM of transformers.
        tokenizer: Its tokenizer; no special tokens are added.
        source: The text, see `read_text`.
        window: Tokens of a window.
        stride: Tokens between windows; None for windows that don't overlap.
        tokens: Only this many from the start of the text; None for all.
        progress: What a progress bar says; None for silence.

    Returns:
        `value` (exp of the mean nats of a predicted token), `nll`, `predicted` (how many tokens),
        and the protocol: `text`, `split`, `digest` (of the text, 16 hexadecimal digits), `window`,
        `stride`, `tokens` (in windows), `tokenizer_tokens_total` (of the whole text), `level`,
        `bos`, `dtype`. `value` is None, with a note that says why, where the perplexity or the loss
        is not finite; of the latter, `nll` is None, too.

    Raises:
        UserError: The text is too short, of instructions, or has tokens that the model has not;
            windows are longer than the model's positions.
    """
    stride = window if stride is None else stride
    check_windows(model.config, window, stride, tokens)
    if source.examples is not None:
        raise UserError(f"expected a plain text, got instructions in {source.name}; name its field")
    whole = tokenize(source, tokenizer).ids
    ids = whole[:tokens]
    check_vocabulary(tokenizer, ids, getattr(model.config, "vocab_size", None))
    batches = windows(ids, window, stride)
    if not batches:
        raise UserError(
            f"expected at least {window} tokens in {source.name}, got {ids.numel()}; give a longer "
            "text or smaller --windows"
        )
    value, nll = _measured(model, batches, progress, progress or source.name)
    count = sum(len(batch["input_ids"]) for batch in batches)
    return {
        "value": value,
        "nll": nll,
        "predicted": sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches),
        "text": source.name,
        "split": source.split or "whole text",
        "digest": source.digest()[:16],
        "window": window,
        "stride": stride,
        "tokens": window + (count - 1) * stride,
        "tokenizer_tokens_total": whole.numel(),
        "level": "token",
        "bos": False,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def _measured(
    model: nn.Module, batches: list[dict[str, Tensor]], progress: str | None, what: str
) -> tuple[float | None, float | None]:
    """Perplexity and nats of a token; None and a note for what is not finite."""
    try:
        found = perplexity(model, batches, progress=progress)
    except NotFiniteError as error:
        note(f"{what}: {error}")
        return None, None
    if math.isfinite(found.value):
        return found.value, found.nll
    note(f"{what}: too large for a number, {found.nll:,.1f} nats of a token")
    return None, found.nll


def check_windows(config: Any, window: int, stride: int | None, tokens: int | None) -> None:
    """Refuse windows that can't be.

    Args:
        config: The model's config.
        window: Tokens of a window.
        stride: Tokens between windows; None for windows that don't overlap.
        tokens: Only this many from the start of a text; None for all.

    Raises:
        UserError: A number is out of range, or a window longer than the model's positions.
    """
    stride = window if stride is None else stride
    if window < 2 or not 1 <= stride <= window:
        raise UserError(
            "expected windows of at least 2 tokens and a stride from 1 to the window, got "
            f"{window} and {stride}"
        )
    if tokens is not None and tokens < window:
        raise UserError(
            f"expected at least {window} tokens, those of a window, got {tokens}; give more "
            "--tokens or smaller --windows"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and window > positions:
        raise UserError(
            f"expected windows of at most {positions} tokens, the model's positions, got {window}; "
            "give smaller --windows"
        )


def protocol(entry: dict[str, Any]) -> tuple[Any, ...]:
    """What two perplexities must share to be compared."""
    return tuple(entry.get(key) for key in PROTOCOL)


#: Keys of a perplexity that say how it was measured.
PROTOCOL: Sequence[str] = (
    "text",
    "split",
    "digest",
    "window",
    "stride",
    "tokens",
    "level",
    "bos",
    "dtype",
)
