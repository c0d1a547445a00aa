"""How a `PrunableLM` gets its model."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lit_prune.dtypes import DTYPES
from lit_prune.errors import UserError
from lit_prune.export import read_lineage
from lit_prune.pretrained import load_pretrained, resolve
from lit_prune.structure import Layout, Structure, Widths, settle


def load_dense(module: Any) -> tuple[Any, Any]:
    """The model and its tokenizer as they are where a `PrunableLM` has them from."""
    return load_pretrained(
        module.pretrained,
        dtype=DTYPES[module.dtype_name],
        attn_implementation=module.attn_implementation,
        **module.access,
    )


def configure(module: Any) -> None:
    """Load a `PrunableLM`'s model, with what an earlier pruning wrote down of it."""
    model, tokenizer = load_dense(module)
    module._outside.setdefault("tokenizer", tokenizer)
    widths = None
    source = resolve(module.pretrained)
    if source.local and source.gguf is None:
        record = read_lineage(source.place)
        module.lineage = list(record["lineage"])
        if record["layout"] is not None:
            saved = record["layout"]["widths"]
            widths = Widths(saved["shared"], saved["layers"])
    adopt(module, model, widths)
    module.is_stock = widths is None or settle(model, module.structure, module.layout)


def adopt(module: Any, model: Any, widths: Widths | None = None) -> None:
    """Make a model a `PrunableLM`'s own.

    Args:
        module: The `PrunableLM`.
        model: A causal language model of transformers.
        widths: Its widths, where its config does not tell them.
    """
    module.structure = Structure.of(model, widths)
    module.layout = Layout.full(module.structure.widths)
    if module.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    module.model = model


def check_length(module: Any, tokens: int, what: str) -> None:
    """Refuse windows longer than a model has positions for; see the method of this name."""
    limit = getattr(module.model.config, "max_position_embeddings", None) or tokens
    if tokens <= limit:
        return
    message = f"expected {what} of at most {limit} tokens, the model's context, got {tokens}"
    if "position" in module.structure.widths.shared:
        raise UserError(f"{message}; set a shorter length")
    rank_zero_warn(f"{message}: the figures will say little")
