"""Is a cut model stock? Decided by trial: build the stock class on meta and compare."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

#: Attributes that say how a model is being used, or that nothing in its result depends on.
_RUNTIME = frozenset(
    {
        "training",
        "gradient_checkpointing",
        "name_or_path",
        "max_seq_len_cached",  # grows with the longest text seen, for dynamic rotary scaling
        "loss_type",  # read off the class's name; unknown ones get the causal loss too
        "has_sliding_layers",  # only whether a mask is prepared that no layer may ask for
    }
)
#: Config entries that are no property of the model, and ours.
_RUNTIME_FIELDS = frozenset({"lit_prune", "auto_map", "architectures", "transformers_version"})
#: What exports, quantizers and GGUF files leave on a config; its class knows its model_type.
_NOT_STOCK = ("lit_prune", "auto_map", "model_type", "quantization_config", "_model_name_or_path")
_HEADS = ("lit_prune_heads", "lit_prune_dense_heads")
_VALUES = "lit_prune_values"


@dataclass
class Comparison:
    """How a model differs from one that its class would build from a config.

    Attributes:
        shapes: Shape of each parameter and persistent buffer that differs; None if it has none.
        attributes: Per module path, its plain attributes that differ; `config` holds the fields of
            a config of its own.
        other: Differences that sizes alone cannot mend, in words.
    """

    shapes: dict[str, list[int] | None] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    other: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Every difference as one line of text."""
        lines = [f"{name}: shape {shape}" for name, shape in self.shapes.items()]
        for path, values in self.attributes.items():
            lines += [f"{path or 'model'}: {name} = {value}" for name, value in values.items()]
        return lines + self.other


def differences(model: Any, config: Any) -> list[str]:
    """Compare a cut model with the stock model that a reader would build from a config.

    The config is written to and read from a config.json first, since a reader gets that.

    Args:
        model: A causal language model of transformers, cut in place.
        config: The stock config proposed for it.

    Returns:
        The differences in parameter shapes, remembered sizes, per-layer configs, hooks of ours,
        ties and classes, or the reason why no model can be built. Empty: the model is stock.

    Raises:
        OSError: config.json could not be written, which says nothing of the model.
        MemoryError: Nor does this.
    """
    try:
        trial = stock_trial(model, config)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever a config class or a model's __init__ refuses with
        first = str(error).strip().splitlines() or [type(error).__name__]
        return [f"the stock class refuses the config: {first[0]}"]
    return compare(model, trial).lines()


def stock_trial(model: Any, config: Any) -> Any:
    """Build on meta what `AutoModelForCausalLM` makes of a config.json.

    Args:
        model: The model whose dtype it takes.
        config: A stock config.

    Returns:
        The model, without values.
    """
    config = stock_config(config)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        read = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    read._attn_implementation = config._attn_implementation
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(read, dtype=model.dtype)


def stock_class(kind: type) -> Any:
    """The stock class behind a config's or a model's class (see `modeling_lit_pruned`)."""
    return getattr(kind, "lit_prune_stock", kind)


def stock_config(config: Any) -> Any:
    """A copy of a config in its stock class, without the entries of exports and quantizers."""
    plain = copy.deepcopy(config)
    plain.__class__ = stock_class(type(config))
    for name in _NOT_STOCK:
        vars(plain).pop(name, None)
    plain._name_or_path = ""
    return plain


def compare(model: Any, trial: Any) -> Comparison:
    """Compare a model with one built on meta, module by module.

    Args:
        model: The model in memory.
        trial: What a reader would build.

    Returns:
        The differences.
    """
    found = Comparison()
    ours, theirs = dict(model.named_modules()), dict(trial.named_modules())
    if ours.keys() != theirs.keys():
        names = sorted(ours.keys() ^ theirs.keys())
        found.other.append(f"modules differ: {', '.join(names[:3])}{', …' * (len(names) > 3)}")
        return found
    if _ties(model) != _ties(trial):
        found.other.append(f"tied parameters: {_ties(model)} instead of {_ties(trial)}")
    for path, module in ours.items():
        other = theirs[path]
        if stock_class(type(module)) is not stock_class(type(other)):
            kinds = f"{type(module).__name__} instead of {type(other).__name__}"
            found.other.append(f"{path or 'model'}: {kinds}")
            continue
        _compare_tensors(path, module, other, found)
        values = dict(_attributes(module, other)) | dict(_hooked(module, other))
        own = dict(_own_fields(module, other, model.config))
        if own:
            values["config"] = own
        if values:
            found.attributes[path] = values
    return found


def _compare_tensors(path: str, module: nn.Module, other: nn.Module, found: Comparison) -> None:
    prefix = f"{path}." if path else ""
    volatile = other._non_persistent_buffers_set
    ours = {**module._parameters, **module._buffers}
    theirs = {**other._parameters, **other._buffers}
    for name, tensor in ours.items():
        if name in theirs and name not in volatile and _shape(tensor) != _shape(theirs[name]):
            found.shapes[prefix + name] = _shape(tensor)
        elif name not in theirs and name not in module._non_persistent_buffers_set:
            found.other.append(f"{prefix}{name}: not in {type(other).__name__}")
    for name, tensor in theirs.items():
        # a volatile buffer is computed by the reader, who has only the config for it
        if name not in ours or (name in volatile and _shape(ours[name]) != _shape(tensor)):
            mine = _shape(ours[name]) if name in ours else "nothing"
            found.other.append(f"{prefix}{name}: {mine} instead of {_shape(tensor)}")


def _shape(tensor: torch.Tensor | None) -> list[int] | None:
    return None if tensor is None else list(tensor.shape)


def _attributes(module: nn.Module, other: nn.Module) -> Iterator[tuple[str, Any]]:
    """Plain attributes that the stock module has and whose value differs.

    An attribute that the stock module lacks is not read by its forward pass.
    """
    mine = vars(module)
    for name, value in vars(other).items():
        if name.startswith("_") or name in _RUNTIME or not _is_plain(value):
            continue
        if name in mine and _plain(mine[name]) != _plain(value):
            yield name, _plain(mine[name])


def _hooked(module: nn.Module, other: nn.Module) -> Iterator[tuple[str, Any]]:
    """What our own hooks of `modeling_lit_pruned` work with, where it differs."""
    if (values := getattr(module, _VALUES, None)) != getattr(other, _VALUES, None):
        yield _VALUES, copy.deepcopy(values)
    mine, theirs = ([getattr(m, name, None) for name in _HEADS] for m in (module, other))
    all_heads = mine[0] is not None and mine[0] == list(range(mine[1] or 0))
    if mine != theirs and not (all_heads and theirs[0] is None):
        yield from zip(_HEADS, mine, strict=True)


def _own_fields(module: nn.Module, other: nn.Module, shared: Any) -> Iterator[tuple[str, Any]]:
    """Fields that a module's own config has from no shared one, where the trial's differ."""
    config, theirs = vars(module).get("config"), vars(other).get("config")
    if not isinstance(config, PretrainedConfig) or config is shared:
        return
    for name, value in vars(config).items():
        if name.startswith("_") or name in _RUNTIME_FIELDS or not _is_plain(value):
            continue
        if value != getattr(shared, name, None) and value != getattr(theirs, name, None):
            yield name, _plain(value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(entry, int) for entry in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _ties(model: nn.Module) -> list[tuple[str, ...]]:
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return sorted(tuple(names) for names in groups.values() if len(names) > 1)
