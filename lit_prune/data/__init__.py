"""Text in, batches out."""

from lit_prune.data.module import TextDataModule
from lit_prune.data.sources import Source, read_source
from lit_prune.data.tokens import Tokens, check_vocabulary, tokenize

__all__ = ["Source", "TextDataModule", "Tokens", "check_vocabulary", "read_source", "tokenize"]
