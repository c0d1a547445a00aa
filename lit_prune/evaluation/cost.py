"""What a model costs, from its layout alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_prune.evaluation.sizes import cached, checkpoint_bytes, weight_bytes, within
from lit_prune.structure import Structure
from lit_prune.structure.counting import attention_macs, count_actual, linear_macs


def cost(
    model: Any,
    structure: Structure,
    lengths: Sequence[int] = (64, 2048),
    checkpoint: str | Path | None = None,
) -> dict[str, Any]:
    """Parameters, multiply-accumulates (MACs) and bytes of a model.

    MACs are those of matrix products, as torch's FLOP counter sees them (two FLOPs each): every
    linear layer for every token, the head (lm_head) too, and attention's scores and its mixing of
    values. Embeddings, norms, activations, softmax, biases and rotary angles are left out.
    Attention counts what its maths needs: token t looks at t tokens, or at its layer's sliding
    window, so a sequence costs the causal half of the square. An implementation that computes the
    whole square and masks it, such as eager attention, does more. Values narrower than keys are
    padded to the keys' width inside attention, and are counted and cached as padded.

    Args:
        model: The model; it may be on meta, as `lit_prune.evaluation.skeleton.skeleton` makes it.
        structure: Its structure.
        lengths: Tokens in the context, and of the sequences.
        checkpoint: Folder whose `*.safetensors` are measured.

    Returns:
        `parameters` and `decoder_parameters` (of the decoder layers), tied ones once;
        `weight_bytes` of all parameters in the model's `dtype`; `checkpoint_bytes`, None without a
        folder or without such files in it; by length `macs_per_token` (of the last token, the
        others being cached) and `macs_of_sequence` (of all tokens in one pass);
        `cache_bytes_per_token` of keys and values (None where a forward pass can't be tried on
        meta); `widths` of each axis, in each layer.
    """
    widths, layers = structure.widths, cached(model)
    windows = [layer.window for layer in layers] if layers else [None] * len(widths.layers)
    linear = linear_macs(model, structure, widths)
    last, whole = {}, {}
    for length in lengths:
        looked = [[within(t, window) for t in range(1, length + 1)] for window in windows]
        last[str(length)] = linear + attention_macs(widths, [each[-1] for each in looked])
        whole[str(length)] = length * linear + attention_macs(widths, list(map(sum, looked)))
    return {
        "parameters": count_actual(model, structure),
        "decoder_parameters": count_actual(model, structure, decoder=True),
        "weight_bytes": weight_bytes(model),
        "checkpoint_bytes": checkpoint_bytes(checkpoint) or None if checkpoint else None,
        "macs_per_token": last,
        "macs_of_sequence": whole,
        "cache_bytes_per_token": sum(layer.token_bytes for layer in layers) if layers else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "widths": _widths(structure),
    }


def _widths(structure: Structure) -> dict[str, list[int]]:
    """Of each axis that the family can cut, in each layer; `hidden` is the same in all."""
    sizes = [structure.widths.sizes(layer) for layer in range(len(structure.widths.layers))]
    return {axis: [s[axis] for s in sizes] for axis in structure.axes() if axis != "layer"}
