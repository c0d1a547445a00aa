"""Causal language models cut to sizes that their stock config cannot express.

This file travels with the checkpoint: it needs torch and transformers, nothing else. `config.json`
holds the uncut model's config and, under `lit_prune`, what differs: the shapes of parameters, the
sizes that modules remember, config fields of single layers, the heads that are left where each
head has a position bias of its own (ALiBi), and values that are narrower than keys. The stock class
is built first, then resized; its forward pass is used as it is.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn

#: The layout of the `lit_prune` entry in config.json that this file reads.
FORMAT = 1
FILE_NAME = "modeling_lit_pruned.py"
AUTO_MAP = {
    "AutoConfig": "modeling_lit_pruned.PrunedConfig",
    "AutoModelForCausalLM": "modeling_lit_pruned.PrunedForCausalLM",
}
PREFIX = "lit_pruned_"
# In two parts, so that it occurs once in a written file: where its own last lines begin.
_BINDING = "# The stock classes " + "that this checkpoint was cut from."


def keep_heads(module: nn.Module, heads: list[int], dense_heads: int) -> None:
    """Let an attention module read the ALiBi biases of the heads it still has.

    Args:
        module: The attention module; its forward takes `alibi` and `attention_mask` by name.
        heads: Kept heads in the module's present numbering; an earlier choice is composed.
        dense_heads: Number of heads the model makes the biases for.
    """
    present = getattr(module, "lit_prune_heads", None)
    if present is None:
        module.register_forward_pre_hook(select_heads, with_kwargs=True)
        present = list(range(dense_heads))
    setattr(module, "lit_prune_heads", [int(present[head]) for head in heads])  # noqa: B010
    setattr(module, "lit_prune_dense_heads", int(dense_heads))  # noqa: B010


def select_heads(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: of biases made for all heads, pass on those of the module's heads.

    `alibi` is [batch * heads, 1, keys] (Bloom) or [batch, heads, 1, keys] (Falcon), which also
    adds it to `attention_mask` [batch, heads, queries, keys]; a mask that is common to all heads
    has size 1 there and stays.

    Args:
        module: The attention module, prepared by `keep_heads`.
        args: Its positional arguments.
        kwargs: Its named arguments.

    Returns:
        The arguments to call it with.
    """
    heads, dense = module.lit_prune_heads, module.lit_prune_dense_heads
    kwargs = dict(kwargs)
    alibi, mask = kwargs.get("alibi"), kwargs.get("attention_mask")
    if alibi is not None and alibi.dim() == 3:
        kwargs["alibi"] = alibi.unflatten(0, (-1, dense))[:, heads].flatten(0, 1)
    elif alibi is not None:
        kwargs["alibi"] = alibi[:, heads]
    if mask is not None and mask.dim() == 4 and mask.shape[1] == dense:
        kwargs["attention_mask"] = mask[:, heads]
    return args, kwargs


def narrow_values(
    module: nn.Module, *, writer: str, reader: str, before: int, value: int, head_dim: int
) -> None:
    """Let an attention module run with values narrower than its keys.

    Its code cuts all that it gets into heads of `head_dim`. So what V writes is padded with zeros,
    which attention leaves zeros, and O reads the first `value` features of each head.

    Args:
        module: The attention module; an earlier choice is replaced.
        writer: Name in it of the module that writes values: V, or one with other things in front.
        reader: Name in it of the module that reads what attention makes of them: O.
        before: Features that `writer` writes before the values.
        value: Features of a head that `writer` writes and `reader` reads.
        head_dim: Features of a head in between.
    """
    if getattr(module, "lit_prune_values", None) is None:
        module.register_forward_pre_hook(place_value_hooks)
    setattr(  # noqa: B010 - the type of Module has no such name
        module,
        "lit_prune_values",
        {
            "writer": writer,
            "reader": reader,
            "before": before,
            "value": value,
            "head_dim": head_dim,
        },
    )
    place_value_hooks(module)


def place_value_hooks(module: Any, args: Any = ()) -> None:
    """Forward pre-hook: put the hooks on the modules that stand at the two names now.

    An adapter such as LoRA adds to V's output and reads O's input beside the module that it wraps,
    so the hooks must sit on the wrapper while there is one, and on the module itself before and
    after. They come first, so that other hooks see O's input as O gets it.

    Args:
        module: The attention module, prepared by `narrow_values`.
        args: Its arguments, which stay.
    """
    record = module.lit_prune_values
    writer, reader = (module.get_submodule(record[name]) for name in ("writer", "reader"))
    if _hooked(writer._forward_hooks, record) and _hooked(reader._forward_pre_hooks, record):
        return
    for part in module.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hasattr(hook, "lit_prune_values")]:
                del hooks[key]
    writer.register_forward_hook(PadValues(record), prepend=True)
    reader.register_forward_pre_hook(TakeValues(record), prepend=True)


def _hooked(hooks: dict[int, Any], record: dict[str, Any]) -> bool:
    return any(getattr(hook, "lit_prune_values", None) == record for hook in hooks.values())


class PadValues:
    """Forward hook: append zeros to the values [..., before + heads * value] of each head.

    Args:
        record: As of `narrow_values`.
    """

    def __init__(self, record: dict[str, Any]) -> None:
        self.lit_prune_values = dict(record)

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """Return [..., before + heads * head_dim]."""
        before, value = self.lit_prune_values["before"], self.lit_prune_values["value"]
        missing = self.lit_prune_values["head_dim"] - value
        values = output[..., before:].unflatten(-1, (-1, value))
        padded = nn.functional.pad(values, (0, missing)).flatten(-2)
        return torch.cat([output[..., :before], padded], dim=-1) if before else padded


class TakeValues:
    """Forward pre-hook: of each head's features [..., heads * head_dim] take the first `value`.

    Args:
        record: As of `narrow_values`.
    """

    def __init__(self, record: dict[str, Any]) -> None:
        self.lit_prune_values = dict(record)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments with [..., heads * value] as the first."""
        heads = args[0].unflatten(-1, (-1, self.lit_prune_values["head_dim"]))
        return (heads[..., : self.lit_prune_values["value"]].flatten(-2), *args[1:])


def resize(model: nn.Module, record: dict[str, Any]) -> None:
    """Give a freshly built stock model the sizes of the cut one.

    Args:
        model: The stock model, on any device.
        record: `shapes` {parameter: its shape, or None where it has none} and `attributes`
            {module: {name: value}}, where `config` holds fields of the module's own config.

    Raises:
        ValueError: The record is of another format.
    """
    if record.get("version") != FORMAT:
        raise ValueError(
            f"expected lit_prune format {FORMAT} in config.json, got {record.get('version')!r}"
        )
    for name, shape in record["shapes"].items():
        path, _, leaf = name.rpartition(".")
        _reshape(model.get_submodule(path), leaf, shape)
    for path, values in record["attributes"].items():
        module = model.get_submodule(path)
        for name, value in values.items():
            if name == "config":
                _own_config(module, value)
            elif not name.startswith(("_", "lit_prune_")):
                is_tuple = isinstance(getattr(module, name, None), tuple)
                setattr(module, name, tuple(value) if is_tuple else value)
        if "lit_prune_heads" in values:
            keep_heads(module, values["lit_prune_heads"], values["lit_prune_dense_heads"])
        if "lit_prune_values" in values:
            narrow_values(module, **values["lit_prune_values"])


def _reshape(module: nn.Module, name: str, shape: list[int] | None) -> None:
    """Cut a parameter or buffer to a shape, keeping the first entries; make or drop one."""
    buffer = module._buffers.get(name)
    if buffer is not None:
        module._buffers[name] = buffer.new_empty(shape or [])
        return
    old = module._parameters[name]
    if shape is None or old is None:
        new = None if shape is None else nn.Parameter(torch.zeros(shape))
    else:
        if old.dim() != len(shape) or any(a < b for a, b in zip(old.shape, shape, strict=True)):
            raise ValueError(f"{name}: expected at most {list(old.shape)}, got {shape}")
        new = nn.Parameter(old.detach()[tuple(slice(size) for size in shape)].clone())
    module.register_parameter(name, new)


def _own_config(module: Any, fields: dict[str, Any]) -> None:
    module.config = copy.copy(module.config)
    for name, value in fields.items():
        setattr(module.config, name, value)


@functools.cache
def pruned_classes(base_config: Any, base_model: Any) -> tuple[Any, Any]:
    """Make the config and model class of a cut model from the stock ones.

    Args:
        base_config: A stock config class, such as `LlamaConfig`.
        base_model: Its stock causal language model, such as `LlamaForCausalLM`.

    Returns:
        The two classes; a model differs from the stock one by its config's `lit_prune`.
    """

    class PrunedConfig(base_config):
        model_type = PREFIX + base_config.model_type
        lit_prune_stock = base_config

        def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any):
            # also called by the model's save_pretrained: the file that reads it must lie beside it
            self.auto_map = dict(AUTO_MAP)
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            text = written_source(base_config, base_model)
            (Path(save_directory) / FILE_NAME).write_text(text, encoding="utf-8")
            super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    class PrunedForCausalLM(base_model):
        config_class = PrunedConfig
        lit_prune_stock = base_model

        def __init__(self, config: Any, *inputs: Any, **kwargs: Any) -> None:
            super().__init__(config, *inputs, **kwargs)
            resize(self, config.lit_prune)
            self.tie_weights()

        def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
            super().set_attn_implementation(*args, **kwargs)
            for module in self.modules():  # layers with a config of their own
                own = getattr(module, "config", None)
                if isinstance(own, PrunedConfig) and own is not self.config:
                    own._attn_implementation_internal = self.config._attn_implementation_internal

    for made in (PrunedConfig, PrunedForCausalLM):
        made.__qualname__ = made.__name__
    return PrunedConfig, PrunedForCausalLM


def written_source(base_config: Any, base_model: Any) -> str:
    """The text of this file as it lies in a checkpoint, with its classes made at the end."""
    generic = Path(__file__).read_text(encoding="utf-8").split(_BINDING)[0].rstrip()
    names = f"{base_config.__name__}, {base_model.__name__}"
    return (
        f"{generic}\n\n\n{_BINDING}\nfrom transformers import {names}  # noqa: E402\n\n"
        f"PrunedConfig, PrunedForCausalLM = pruned_classes({names})\n"
    )
