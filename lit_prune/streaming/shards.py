"""Safetensors checkpoints read and written tensor by tensor, so that no more is ever in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_prune.errors import UserError
from lit_prune.loading.source_errors import only_pickles

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
#: Types of weights as the files name them; others are quantized.
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class ShardReader:
    """The tensors of a checkpoint's safetensors files, by name.

    Args:
        folder: A folder with `model.safetensors`, or with several files and their index.

    Raises:
        UserError: There are none, or not all that the index lists.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files = self._find()

    def _find(self) -> dict[str, str]:
        index = self.folder / INDEX_FILE
        if index.is_file():
            try:
                found = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"expected the index of a checkpoint in {index}, got something else ({error}); "
                    "copy it again"
                ) from error
        elif (self.folder / SINGLE_FILE).is_file():
            found = dict.fromkeys(self._names(SINGLE_FILE), SINGLE_FILE)
        else:
            raise only_pickles(str(self.folder))
        for file in sorted(set(found.values())):
            if not (self.folder / file).is_file():
                raise UserError(
                    f"expected {file} in {self.folder}, which {INDEX_FILE} lists, got none; copy "
                    "the checkpoint again"
                )
        return found

    def _names(self, file: str) -> list[str]:
        with self._open(file) as handle:
            return list(handle.keys())

    def headers(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Every tensor's shape, and its type as the files name it.

        Raises:
            UserError: A file can't be read, or lacks a tensor.
        """
        found = {}
        for file, names in self._by_file(self.files).items():
            with self._open(file) as handle:
                for name in names:
                    header = self._of(file, name, handle.get_slice)
                    found[name] = tuple(header.get_shape()), header.get_dtype()
        return found

    def read(self, names: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
        """Read tensors into memory of their own.

        Args:
            names: Which.
            dtype: Of the result.

        Raises:
            UserError: A file can't be read.
        """
        found = {}
        for file, wanted in self._by_file(names).items():
            with self._open(file) as handle:  # pages of the file are let go with it
                for name in wanted:
                    value = self._of(file, name, handle.get_tensor)
                    found[name] = value.to(dtype, copy=True)
        return found

    def _by_file(self, names: Iterable[str]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(self.files[name], []).append(name)
        return found

    def _open(self, file: str) -> Any:
        try:
            return safe_open(self.folder / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise self._broken(file, error) from error

    def _of(self, file: str, name: str, get: Any) -> Any:
        try:
            return get(name)
        except SafetensorError as error:
            raise self._broken(file, error) from error

    def _broken(self, file: str, error: Exception) -> UserError:
        return UserError(
            f"expected whole safetensors files in {self.folder}, got for {file}: {error}; copy "
            "them again"
        )


class ShardWriter:
    """Writes a checkpoint's safetensors files one after another, then their index.

    Args:
        folder: Where to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts: list[list[str]] = []
        self._bytes = self._numbers = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write a file with some tensors.

        Args:
            tensors: By name; none shares memory with another.
        """
        self._parts.append(list(tensors))
        self._bytes += sum(tensor.nbytes for tensor in tensors.values())
        self._numbers += sum(tensor.numel() for tensor in tensors.values())
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, self._part(len(self._parts)), metadata={"format": "pt"})

    def _part(self, number: int) -> Path:
        return self.folder / f"{number}.part"

    def finish(self) -> None:
        """Give the files the names that transformers looks for, now that their number is known."""
        where = {}
        for number, names in enumerate(self._parts, 1):
            file = f"model-{number:05d}-of-{len(self._parts):05d}.safetensors"
            self._part(number).rename(self.folder / file)
            where |= dict.fromkeys(names, file)
        metadata = {"total_parameters": self._numbers, "total_size": self._bytes}
        index = {"metadata": metadata, "weight_map": where}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self.folder / INDEX_FILE).write_text(text, encoding="utf-8")
