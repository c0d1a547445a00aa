"""A model of which one layer at a time is in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.core_model_loading import revert_weight_conversion

from lit_prune.dtypes import DTYPES
from lit_prune.errors import UserError
from lit_prune.export.load import build_pruned
from lit_prune.heap import give_back
from lit_prune.loading.pretrained import attention_of, load_config, resolve
from lit_prune.loading.source_errors import said_in_one_line
from lit_prune.streaming.shards import FLOATS, ShardReader
from lit_prune.structure.families import find_family
from lit_prune.structure.model import Structure


class Shelf:
    """A model on meta, and the files from which its layers are taken.

    Args:
        model: The model, all parameters on meta; what else it has, such as rotary frequencies, is
            in memory.
        structure: Its structure.
        files: Its weights.

    Raises:
        UserError: The files lack a weight, or have one of another shape or type.
    """

    def __init__(self, model: Any, structure: Structure, files: ShardReader) -> None:
        self.model, self.files = model, files
        self._layers = structure.layers(model)
        self._prefix = f"{structure.layers_path}."
        self._present: int | None = None
        self._keys = _keys_in(files, model)

    def take(self, layer: int) -> None:
        """Have a layer's weights in memory, and no other layer's.

        Args:
            layer: Its number.
        """
        if self._present != layer:
            self.put_back()
            self._assign(self._read(self._names(f"{self._prefix}{layer}.")))
            self._present = layer

    def put_back(self) -> None:
        """Let go of the layer in memory; its shapes stay as they are."""
        if self._present is not None:
            self._forget(self.tensors(self._present))
            give_back()
        self._present = None

    def tensors(self, layer: int) -> dict[str, Tensor]:
        """A layer's tensors as they are now, by their names in the model."""
        state = self._layers[layer].state_dict()
        return {f"{self._prefix}{layer}.{name}": value for name, value in state.items()}

    @contextmanager
    def entrance(self, *, first: bool = True) -> Iterator[None]:
        """Have in memory what runs before the layers.

        Args:
            first: Whether to have the first layer, too, instead of the one that is there.
        """
        if first:
            self.take(0)
        base = self._names(f"{self.model.base_model_prefix}.")
        found = self._read(name for name in base if not name.startswith(self._prefix))
        self._assign(found)
        try:
            yield
        finally:
            self._forget(found)

    def outside(self, *, stock: bool) -> Iterator[dict[str, Tensor]]:
        """Read what stands in no layer, tied tensors once, a module at a time.

        Args:
            stock: Whether to name it as files of the stock class do.
        """
        modules: dict[str, list[str]] = {}
        for name in self._keys:
            if not name.startswith(self._prefix):
                modules.setdefault(name.rpartition(".")[0], []).append(name)
        for names in modules.values():
            found = self._read(names)
            yield revert_weight_conversion(self.model, found) if stock else found

    def _names(self, prefix: str) -> list[str]:
        return [name for name in self._keys if name.startswith(prefix)]

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        keys = {name: self._keys[name] for name in names}
        found = self.files.read(keys.values(), self.model.dtype)
        return {name: found[key] for name, key in keys.items()}

    def _assign(self, tensors: Mapping[str, Tensor]) -> None:
        self.model.load_state_dict(tensors, strict=False, assign=True)
        self.model.tie_weights()

    def _forget(self, tensors: Mapping[str, Tensor]) -> None:
        self._assign({n: torch.empty_like(value, device="meta") for n, value in tensors.items()})


def build_empty(
    source: str, *, dtype: str, attn_implementation: str, access: Mapping[str, bool]
) -> tuple[Any, ShardReader]:
    """Build a model without weights, and find them.

    Args:
        source: A local folder with safetensors weights, such as an earlier export.
        dtype: Name of the weights' dtype, see `lit_prune.dtypes.DTYPES`.
        attn_implementation: transformers' name of the attention implementation.
        access: `trust_remote_code` and `token`.

    Returns:
        The model in its stock class and in eval mode, parameters on meta, and the files.

    Raises:
        UserError: The source is something else, or can't be read.
    """
    found = resolve(source)
    if found.gguf is not None:
        raise UserError(
            f"expected a folder with safetensors weights, got {source}, a GGUF file, whose weights "
            "are quantized; prune it with lit-prune fit"
        )
    if not found.local:
        raise UserError(
            f"expected a local folder with safetensors weights, got {source}; fetch it with `hf "
            f"download {source} --local-dir DIR` and give that folder"
        )
    folder = Path(found.place)
    config = load_config(source, **access)
    find_family(config)
    files = ShardReader(folder)
    kind = DTYPES[dtype] or getattr(config, "dtype", None) or _first_dtype(files)
    options = {"dtype": kind, "attn_implementation": attention_of(config, attn_implementation)}
    with said_in_one_line(source):
        # constructors compute buffers, as for a model that is loaded; parameters go to meta
        with init_empty_weights(include_buffers=False):
            if found.pruned:
                model = build_pruned(folder, **options)
            else:
                options["trust_remote_code"] = access["trust_remote_code"]
                model = AutoModelForCausalLM.from_config(config, **options)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    model.tie_weights()  # which on meta are tensors of their own
    return model.eval(), files


def _first_dtype(files: ShardReader) -> torch.dtype:
    kinds = (FLOATS.get(kind) for _, kind in files.headers().values())
    return next((kind for kind in kinds if kind is not None), torch.float32)


def _keys_in(files: ShardReader, model: Any) -> dict[str, str]:
    """What the files call each of the model's tensors, tied ones once.

    Names may lack the base model's prefix, or have it once too often, as transformers allows; or
    be others that the stock class renames when it is loaded, outside of the layers.
    """
    headers, prefix = files.headers(), f"{model.base_model_prefix}."
    found, first, tensors = {}, {}, model.state_dict(keep_vars=True)
    numbers = {name: torch.tensor(number) for number, name in enumerate(tensors)}
    renamed = {int(n): name for name, n in revert_weight_conversion(model, numbers).items()}
    for number, (name, tensor) in enumerate(tensors.items()):
        owner = first.setdefault(id(tensor), name)
        spelled = (name, name.removeprefix(prefix), prefix + name, renamed[number])
        key = next((spelling for spelling in spelled if spelling in headers), None)
        if key is None:
            continue
        _check(files, key, headers[key], tuple(tensor.shape))
        if owner in found and not _equal(files, found[owner], key):
            raise UserError(
                f"expected {found[owner]} and {key}, which the config ties, to be equal in "
                f"{files.folder}, got two tensors; set tie_word_embeddings to false in config.json"
            )
        found.setdefault(owner, key)
    if missing := [name for name in first.values() if name not in found]:
        raise UserError(
            f"expected every weight in the files of {files.folder}, got none for {missing[0]} "
            f"({len(missing)} missing); is it a causal language model, and copied whole?"
        )
    return found


def _check(
    files: ShardReader, key: str, header: tuple[tuple[int, ...], str], shape: tuple[int, ...]
) -> None:
    if header[0] != shape:
        raise UserError(
            f"expected {key} to be {shape} by config.json of {files.folder}, got {header[0]}; the "
            "files are not of one checkpoint"
        )
    if header[1] not in FLOATS:
        raise UserError(
            f"expected a model with floating-point weights, got {key} of type {header[1]} in "
            f"{files.folder}; take the model it was made from"
        )


def _equal(files: ShardReader, *keys: str) -> bool:
    one, other = files.read(keys, torch.float32).values()
    return torch.equal(one, other)
