"""LoRA on a pruned model, and its merge (losses: `lit_prune.recovery.distillation`)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_prune.errors import UserError
from lit_prune.modes import exact_products
from lit_prune.recovery.quantized import Precision, QuantizedLinear

#: peft's name for the adapter of a model, and what it puts before its modules' paths.
NAME = "default"
PEFT_PREFIX = "base_model.model."


def attach_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: list[str],
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Put LoRA (Hu et al., 2021) on linear layers, in place, and freeze everything else.

    W x becomes W x + alpha / rank * B A x with A ~ U(-1/√in, 1/√in) and B = 0. A is drawn from
    `seed` alone, so every rank and device gets the same; the global random state stays as it is.

    Args:
        model: The model; adapters go where their layers are.
        rank: Rows of A, for every target.
        alpha: Scale times rank.
        dropout: Dropout rate of the adapter's input.
        targets: Full paths of the linear layers, such as `model.layers.0.mlp.down_proj`.
        dtype: Type of A and B.
        seed: Seed of A.

    Raises:
        UserError: A value is out of range, LoRA is attached already, or a target isn't there or
            isn't linear or shares its weight with the embedding.
    """
    check_lora(model, rank=rank, alpha=alpha, dropout=dropout, targets=targets)
    transposed = isinstance(model.get_submodule(targets[0]), Conv1D)
    config = LoraConfig(
        r=rank,
        lora_alpha=cast(int, alpha),
        lora_dropout=dropout,
        target_modules=list(targets),
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
    )
    gpus = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(gpus), warnings.catch_warnings():
        # peft warns of each change between Linear and Conv1D, and sets the layer right.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        inject_adapter_in_model(config, model, adapter_name=NAME)
    generator = torch.Generator().manual_seed(seed)
    layers = dict(lora_layers(model))
    if set(layers) != set(targets):
        wrong = sorted(set(layers) ^ set(targets))[0]
        raise UserError(f"expected LoRA on the {len(targets)} given layers only, got {wrong}")
    for path in targets:
        layer = layers[path]
        down, up = _factors(layer)
        bound = 1 / math.sqrt(down.shape[1])
        drawn = torch.empty(down.shape, dtype=torch.float32, device="cpu")
        drawn.uniform_(-bound, bound, generator=generator)
        down.data = drawn.to(down.device, dtype)
        up.data = torch.zeros_like(up, dtype=dtype)
        cast(nn.Module, layer).train(layer.get_base_layer().training)


def check_lora(
    model: PreTrainedModel, *, rank: int, alpha: float, dropout: float, targets: list[str]
) -> None:
    """Refuse what peft would take silently or fail on with a stack trace; see `attach_lora`."""
    if rank < 1 or not 0 <= dropout < 1 or not (alpha > 0 and math.isfinite(alpha)):
        raise UserError(
            "expected LoRA with rank >= 1, alpha > 0 and 0 <= dropout < 1, got "
            f"rank {rank}, alpha {alpha}, dropout {dropout}"
        )
    if has_lora(model):
        raise UserError("expected a model without LoRA, got one that has it; merge it first")
    if not targets:
        raise UserError("expected at least one layer for LoRA, got none")
    modules = dict(model.named_modules())
    for path in targets:
        if not isinstance(modules.get(path), (nn.Linear, Conv1D)):
            kind = type(modules[path]).__name__ if path in modules else "no such module"
            raise UserError(f"expected a linear layer at {path} for LoRA, got {kind}")
        if modules[path].weight is model.get_input_embeddings().weight:
            raise UserError(
                f"expected layers with weights of their own for LoRA, got {path}, which shares its "
                "weight with the embedding, so that a merge would change both; leave it out"
            )


def has_lora(model: nn.Module) -> bool:
    """Whether any layer carries LoRA."""
    return any(isinstance(module, LoraLayer) for module in model.modules())


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every layer, in the model's order."""
    return [factor for _, layer in lora_layers(model) for factor in _factors(layer)]


def quantize_base(model: nn.Module, precision: Precision) -> None:
    """Hold the frozen layers under LoRA in 8 or 4 bit, in place, until it is merged or removed.

    Their dense weights wait on the CPU; `state_dict` gives and loads those.

    Args:
        model: A model with LoRA.
        precision: ``dense`` to leave them as they are, ``8bit`` or ``4bit``.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    for _, layer in lora_layers(model) if precision != "dense" else ():
        base = cast(nn.Linear, layer.get_base_layer())
        layer.base_layer = QuantizedLinear(base, precision, keep=True)


def _base(layer: LoraLayer) -> nn.Linear | Conv1D:
    """The dense layer under LoRA."""
    base = layer.get_base_layer()
    return base.dense() if isinstance(base, QuantizedLinear) else cast(nn.Linear, base)


def merge_lora(model: nn.Module) -> None:
    """Merge LoRA into the weights, in place, and put the plain layers back.

    W <- round(float32(W) + alpha / rank * float32(B) @ float32(A)), rounded once to W's dtype;
    the modules, their names and order are then those before `attach_lora`, and every parameter
    takes gradients again. A model without LoRA stays as it is.

    Args:
        model: A model with LoRA.

    Raises:
        UserError: An adapter has NaN or infinite values; then nothing is merged.
    """
    layers = list(lora_layers(model))
    for path, layer in layers:
        if not all(factor.isfinite().all() for factor in _factors(layer)):
            raise UserError(
                f"expected finite LoRA weights, got NaN or infinity at {path}; "
                "the recovery diverged, lower its learning rate"
            )
    for _, layer in layers:
        base = _base(layer)
        _add_update(cast(nn.Parameter, base.weight), layer, isinstance(base, Conv1D))
    remove_lora(model)


def remove_lora(model: nn.Module) -> None:
    """Take LoRA off, in place, without merging it; see `merge_lora` for what is put back.

    Args:
        model: A model, with LoRA or without.
    """
    layers = list(lora_layers(model))
    for path, layer in layers:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, _base(layer))
    if layers:
        if hasattr(model, "peft_config"):
            del model.peft_config
        model.requires_grad_(True)


@torch.no_grad()
def _add_update(weight: nn.Parameter, layer: LoraLayer, transposed: bool) -> None:
    """W <- W + s B A in at least float32, also where the caller runs under autocast."""
    down, up = _factors(layer)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(weight.device.type, enabled=False), exact_products(dtype):
        update = layer.scaling[NAME] * (up.to(dtype) @ down.to(dtype))
        weight.copy_(weight.to(dtype) + (update.T if transposed else update))


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's weights, detached, not copied.

    Returns:
        `<layer>.lora_A.weight` [rank, in] and `<layer>.lora_B.weight` [out, rank] of each layer.
    """
    state = {}
    for path, layer in lora_layers(model):
        down, up = _factors(layer)
        state[f"{path}.lora_A.weight"] = down.detach()
        state[f"{path}.lora_B.weight"] = up.detach()
    return state


def check_adapter(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Refuse an adapter that doesn't fit a model.

    Args:
        model: The model, with or without LoRA on it.
        state: Weights as of `adapter_state`, or as read from a peft folder.

    Raises:
        UserError: Names the first layer that is missing or has another shape.
    """
    modules = dict(model.named_modules())
    order = {path: number for number, path in enumerate(modules)}

    def place(key: str) -> tuple[int, str]:
        return order.get(_layer_of(key)[0], -1), key

    for key in sorted(state, key=place):
        path, factor = _layer_of(key)
        module, tensor = modules.get(path), state[key]
        base = module.get_base_layer() if isinstance(module, LoraLayer) else module
        size = _size(base)
        if size is None or factor not in ("A.weight", "B.weight"):
            raise UserError(
                f"expected an adapter of this model, got one with {key}, and the model has no "
                "such linear layer; use the model the adapter was trained on"
            )
        expected, got = (size[1], tensor.shape[-1]) if factor[0] == "A" else (size[0], len(tensor))
        if tensor.ndim != 2 or expected != got:
            side = "inputs" if factor[0] == "A" else "outputs"
            raise UserError(
                f"expected an adapter with {expected} {side} at {path}, got {got}; "
                "use the model the adapter was trained on (same base, same cut)"
            )


def _layer_of(key: str) -> tuple[str, str]:
    """A layer's path, and which of its weights a key names."""
    path, _, factor = key.removeprefix(PEFT_PREFIX).rpartition(".lora_")
    return path, factor


def _size(layer: object) -> tuple[int, int] | None:
    """Outputs and inputs of a linear layer, None for others."""
    if isinstance(layer, QuantizedLinear):
        return layer.out_features, layer.in_features
    if isinstance(layer, (nn.Linear, Conv1D)):
        outputs, inputs = layer.weight.shape[:: -1 if isinstance(layer, Conv1D) else 1]
        return outputs, inputs
    return None


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Path and LoRA layer, in the model's order."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield path, module


def _factors(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    """A [rank, in] and B [out, rank]."""
    down, up = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    return cast(nn.Parameter, down), cast(nn.Parameter, up)
