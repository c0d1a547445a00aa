"""LoRA on a pruned model, and its merge (losses to train it with: `lit_prune.distillation`)."""

from __future__ import annotations

import math
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_prune.errors import UserError
from lit_prune.files import follow_umask

_NAME = "default"
_PEFT_PREFIX = "base_model.model."


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
        inject_adapter_in_model(config, model, adapter_name=_NAME)
    generator = torch.Generator().manual_seed(seed)
    layers = dict(_lora_layers(model))
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
    return [factor for _, layer in _lora_layers(model) for factor in _factors(layer)]


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
    layers = list(_lora_layers(model))
    for path, layer in layers:
        if not all(factor.isfinite().all() for factor in _factors(layer)):
            raise UserError(
                f"expected finite LoRA weights, got NaN or infinity at {path}; "
                "the recovery diverged, lower its learning rate"
            )
    for _, layer in layers:
        base = layer.get_base_layer()
        _add_update(cast(nn.Parameter, base.weight), layer, isinstance(base, Conv1D))
    remove_lora(model)


def remove_lora(model: nn.Module) -> None:
    """Take LoRA off, in place, without merging it; see `merge_lora` for what is put back.

    Args:
        model: A model, with LoRA or without.
    """
    layers = list(_lora_layers(model))
    for path, layer in layers:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer.get_base_layer())
    if layers:
        if hasattr(model, "peft_config"):
            del model.peft_config
        model.requires_grad_(True)


@torch.no_grad()
def _add_update(weight: nn.Parameter, layer: LoraLayer, transposed: bool) -> None:
    """W <- W + s B A in at least float32, also where the caller runs under autocast."""
    down, up = _factors(layer)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(weight.device.type, enabled=False):
        update = layer.scaling[_NAME] * (up.to(dtype) @ down.to(dtype))
        weight.copy_(weight.to(dtype) + (update.T if transposed else update))


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's weights, detached, not copied.

    Returns:
        `<layer>.lora_A.weight` [rank, in] and `<layer>.lora_B.weight` [out, rank] of each layer.
    """
    state = {}
    for path, layer in _lora_layers(model):
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
    for key, tensor in state.items():
        path, _, factor = key.removeprefix(_PEFT_PREFIX).rpartition(".lora_")
        module = modules.get(path)
        base = module.get_base_layer() if isinstance(module, LoraLayer) else module
        if not isinstance(base, (nn.Linear, Conv1D)) or factor not in ("A.weight", "B.weight"):
            raise UserError(
                f"expected an adapter of this model, got one with {key}, and the model has no "
                "such linear layer; use the model the adapter was trained on"
            )
        size = tuple(base.weight.shape[:: -1 if isinstance(base, Conv1D) else 1])
        expected, got = (size[1], tensor.shape[-1]) if factor[0] == "A" else (size[0], len(tensor))
        if tensor.ndim != 2 or expected != got:
            side = "inputs" if factor[0] == "A" else "outputs"
            raise UserError(
                f"expected an adapter with {expected} {side} at {path}, got {got}; "
                "use the model the adapter was trained on (same base, same cut)"
            )


def save_adapter(model: nn.Module, directory: str | Path, *, base: str | None = None) -> None:
    """Write the adapter as a folder that `peft.PeftModel.from_pretrained(model, dir)` loads.

    Written under a temporary name and moved; safetensors only.

    Args:
        model: A model with LoRA.
        directory: The folder to make.
        base: Name of the model it belongs to, for adapter_config.json.

    Raises:
        UserError: The model has no LoRA, or the folder exists and isn't empty.
    """
    target = Path(directory)
    if not has_lora(model):
        raise UserError("expected a model with LoRA to save its adapter, got one without")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"expected a new folder, got {target}, which exists; choose another")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        new = scratch / target.name
        new.mkdir()
        _write_adapter(model, new, base)
        new.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_adapter(model: nn.Module, directory: Path, base: str | None) -> None:
    """adapter_model.safetensors and adapter_config.json, in peft's names."""
    state = adapter_state(model)
    tensors = {_PEFT_PREFIX + key: value.cpu().contiguous() for key, value in state.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    follow_umask(directory)
    attached = cast(dict[str, LoraConfig], model.peft_config)[_NAME]
    config = LoraConfig(
        r=attached.r,
        lora_alpha=attached.lora_alpha,
        lora_dropout=attached.lora_dropout,
        target_modules=sorted(path for path, _ in _lora_layers(model)),
        fan_in_fan_out=attached.fan_in_fan_out,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    # peft keeps the targets as a set, whose order changes from run to run.
    config.target_modules = sorted(config.target_modules or ())
    config.save_pretrained(str(directory))


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Path and LoRA layer, in the model's order."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield path, module


def _factors(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    """A [rank, in] and B [out, rank]."""
    down, up = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
    return cast(nn.Parameter, down), cast(nn.Parameter, up)
