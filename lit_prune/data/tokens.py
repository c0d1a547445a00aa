"""From text to token ids: tokenised once, kept in a cache that is keyed by content."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_prune.data.cache import cached, default_cache_dir
from lit_prune.data.instructions import render
from lit_prune.data.sources import Source
from lit_prune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

FORMAT_VERSION = 1
BATCH_CHARACTERS = 1_000_000
PIECE_CHARACTERS = 2_000_000
OVERLAP_CHARACTERS = 2_000
STABLE_CHARACTERS = 100
SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Tokens:
    """Token ids of a source.

    Attributes:
        ids: All tokens in order, int32 [tokens].
        offsets: For instructions, where each row starts in `ids`, and the end: int64 [rows + 1].
        prompts: For instructions, how many tokens of each row are prompt: int64 [rows].
    """

    ids: Tensor
    offsets: Tensor | None = None
    prompts: Tensor | None = None

    @property
    def units(self) -> int:
        """Returns what a split counts: rows of instructions, else tokens."""
        return self.ids.numel() if self.offsets is None else self.offsets.numel() - 1


def tokenize(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    field: str = "text",
    cache_dir: str | os.PathLike[str] | None = None,
) -> Tokens:
    """Tokenises a source, or takes its tokens from the cache.

    Documents are joined with the tokenizer's end-of-sequence token, or with an empty line where it
    has none. No special tokens are added.

    Args:
        source: What was read.
        tokenizer: The model's tokenizer.
        field: The field that the text came from; part of the key.
        cache_dir: The cache's folder; None is the platform's.

    Returns:
        The tokens. A cache that can't be read or written is done without.
    """
    path = None
    fingerprint = tokenizer_digest(tokenizer)
    if fingerprint is not None:
        extra = [tokenizer.eos_token_id]
        if source.examples is not None:
            extra.append(tokenizer.chat_template)
        key = json.dumps([FORMAT_VERSION, source.digest(), fingerprint, field, extra])
        folder = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
        if folder is not None:
            path = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def build() -> dict[str, Tensor]:
        _log.info("tokenising %s", source.name)
        if source.examples is not None:
            return encode_examples(tokenizer, source)
        return {"ids": encode_documents(tokenizer, source.documents)}

    return Tokens(**cached(path, build))


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns the sha256 of the serialised backend, or None where there is none (then no cache)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    text = backend.to_str()
    # what stands before it, truncation and padding, changes from call to call
    return hashlib.sha256(text[max(text.find('"added_tokens"'), 0) :].encode()).hexdigest()


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, tokens: Tensor, vocab_size: int | None
) -> None:
    """Refuses tokens that the model has no embedding for.

    Args:
        tokenizer: Where the tokens come from.
        tokens: Token ids [any].
        vocab_size: Rows of the model's embedding; None is not checked.

    Raises:
        UserError: A token id is not below `vocab_size`.
    """
    if vocab_size is None or tokens.numel() == 0:
        return
    largest = int(tokens.max())
    if largest >= vocab_size:
        raise UserError(
            f"expected token ids below the model's vocabulary of {vocab_size}, got {largest} from "
            f"a tokenizer of {len(tokenizer)} tokens; use the tokenizer that belongs to the model"
        )


def encode_documents(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str]) -> Tensor:
    """Tokenises documents and joins them.

    Args:
        tokenizer: The tokenizer.
        documents: The texts.

    Returns:
        Token ids, int32 [tokens].
    """
    if tokenizer.eos_token_id is not None:
        separator = torch.tensor([tokenizer.eos_token_id], dtype=torch.int32)
    else:
        separator = next(encode_texts(tokenizer, [SEPARATOR]))
    joined: list[Tensor] = []
    for ids in encode_texts(tokenizer, documents):
        joined += [separator, ids] if joined else [ids]
    return torch.cat(joined) if joined else torch.empty(0, dtype=torch.int32)


def encode_examples(tokenizer: PreTrainedTokenizerBase, source: Source) -> dict[str, Tensor]:
    """Tokenises instructions; prompt and answer apart, as a model that answers would see them.

    Args:
        tokenizer: The tokenizer.
        source: A source with examples.

    Returns:
        The fields of `Tokens`.
    """
    rendered = [render(tokenizer, example) for example in source.examples or ()]
    prompts = list(encode_texts(tokenizer, [r.prompt for r in rendered]))
    answers = list(encode_texts(tokenizer, [r.answer for r in rendered]))
    empty = torch.empty(0, dtype=torch.int32)
    rows = []
    for text, prompt, answer in zip(rendered, prompts, answers, strict=True):
        end = empty if text.end is None else torch.tensor([text.end], dtype=torch.int32)
        rows.append(torch.cat([prompt, answer, end]))
    lengths = torch.tensor([0, *map(len, rows)])
    return {
        "ids": torch.cat([empty, *rows]),
        "offsets": lengths.cumsum(0),
        "prompts": torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64),
    }


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[Tensor]:
    """Tokenises texts one by one, in batches of bounded size.

    Args:
        tokenizer: The tokenizer.
        texts: The texts.

    Yields:
        The token ids of each text, int32 [tokens].
    """
    batch: list[str] = []
    for position, text in enumerate(texts):
        if len(text) > PIECE_CHARACTERS:
            ids = _encode_in_pieces(tokenizer, text)
            yield _to_tensor(_encode(tokenizer, text)["input_ids"]) if ids is None else ids
            continue
        batch.append(text)
        following = texts[position + 1] if position + 1 < len(texts) else None
        if (
            following is None
            or len(following) > PIECE_CHARACTERS
            or sum(map(len, batch)) + len(following) > BATCH_CHARACTERS
        ):
            yield from map(_to_tensor, _encode(tokenizer, batch)["input_ids"])
            batch = []


def _to_tensor(ids: list[int]) -> Tensor:
    return torch.tensor(ids, dtype=torch.int32)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str | list[str], **options: Any) -> Any:
    return tokenizer(
        text,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # a long text is meant: windows are cut from its tokens
        **options,
    )


def _encode_in_pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor | None:
    """Tokenises a very long text piece by piece, for memory's sake, with the tokens of the whole.

    Pieces overlap. A piece is kept up to a word's end well before its own end, the next one starts
    there and must repeat what the piece before had after it. Where it does not (or the tokenizer
    has no words) the answer is None, and the text is to be tokenised whole.
    """
    if not tokenizer.is_fast:
        return None
    kept: list[Tensor] = []
    repeated: list[int] = []
    start = 0
    while True:
        piece = text[start : start + PIECE_CHARACTERS]
        encoding = _encode(tokenizer, piece, return_offsets_mapping=True)
        ids = encoding["input_ids"]
        if ids[: len(repeated)] != repeated:
            return None
        if start + len(piece) == len(text):
            return torch.cat([*kept, _to_tensor(ids)])
        ends = [end for _, end in encoding["offset_mapping"]]
        seam = _seam(piece, ends, encoding.word_ids())
        if seam is None:
            return None
        stable = next(
            i for i in range(len(ends), 0, -1) if ends[i - 1] <= len(piece) - STABLE_CHARACTERS
        )
        kept.append(_to_tensor(ids[:seam]))
        repeated = ids[seam:stable]
        start += ends[seam - 1]


def _seam(piece: str, ends: list[int], words: list[int | None]) -> int | None:
    """Returns the last token that starts a word with a space, well before the piece's end."""
    last = len(piece) - OVERLAP_CHARACTERS
    for token in range(len(ends) - 1, 0, -1):
        end = ends[token - 1]
        if not 0 < end <= last or words[token - 1] == words[token]:
            continue
        # offsets may leave spaces out, so the cut is between a word and a plain space only
        if piece[end] == " " and not piece[end - 1].isspace():
            return token
    return None


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer by itself.

    Args:
        source: Hub id, local folder or .gguf file. Code that comes with it is never run.

    Returns:
        The tokenizer.

    Raises:
        UserError: It can't be loaded.
    """
    from transformers import AutoTokenizer

    path = Path(source).expanduser()
    options: dict[str, Any] = {"trust_remote_code": False}  # by default it asks on stdin
    if path.suffix.lower() == ".gguf":
        options["gguf_file"] = path.name
        path = path.parent
    try:
        return AutoTokenizer.from_pretrained(str(path) if path.exists() else source, **options)
    except Exception as error:
        # transformers, the hub and the parsers raise all kinds; the user gets one line
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"expected a tokenizer at {source!r}, got none: {reason}") from error
