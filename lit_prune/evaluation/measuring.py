"""Measuring a model and the one it was pruned from, part by part."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lit_prune.dtypes import DTYPES
from lit_prune.errors import UserError
from lit_prune.evaluation import tasks as zeroshot
from lit_prune.evaluation.cost import cost
from lit_prune.evaluation.footprint import footprint
from lit_prune.evaluation.record import FILE, fingerprint
from lit_prune.evaluation.speed import generation_speed
from lit_prune.evaluation.texts import check_windows, text_perplexity
from lit_prune.export import read_lineage
from lit_prune.loading.opening import digest_of
from lit_prune.loading.pretrained import load_config, load_pretrained, resolve
from lit_prune.notes import note
from lit_prune.reporting.card import public_name
from lit_prune.structure import Structure, Widths


@dataclass(frozen=True)
class Place:
    """Where a model is and where its figures go.

    Attributes:
        source: As of `lit_prune.loading.pretrained.load_pretrained`.
        name: What it is called, without folders of this machine.
        record: The file of its figures, or None where it has no folder of its own.
        named: Whether the user gave it; otherwise, a checkpoint names it.
        digest: What its `digest_of` must be, if that is known.
    """

    source: str
    name: str
    record: Path | None = None
    named: bool = True
    digest: str | None = None

    @classmethod
    def of(cls, model: str) -> Place:
        """Understand a run's folder, a checkpoint's, and what is in none.

        Args:
            model: What the user gave.
        """
        folder = Path(model).expanduser()
        if not folder.is_dir():
            return cls(model, public_name(model))
        folder = folder.resolve()
        if (folder / "pruned/config.json").is_file() and not (folder / "config.json").is_file():
            return cls(str(folder / "pruned"), folder.name, folder / FILE)
        if folder.name == "pruned" and (folder.parent / "config.yaml").is_file():
            return cls(str(folder), folder.parent.name, folder.parent / FILE)
        return cls(str(folder), folder.name, folder / FILE)


@dataclass(frozen=True)
class Asked:
    """What shall be measured of each model.

    Attributes:
        texts: What `lit_prune.evaluation.texts.read_text` gave.
        windows: Tokens of a window.
        stride: Tokens between windows, or None.
        tokens: Only this many of each text, or None.
        tasks: `tasks` and further arguments of `lit_prune.evaluation.tasks.evaluate_tasks`.
        dtype: Name of a type of weights.
        device: Where the models run.
        access: `trust_remote_code` and `token`.
    """

    texts: Sequence[Any]
    windows: Sequence[int]
    stride: int | None
    tokens: int | None
    tasks: Mapping[str, Any]
    dtype: str
    device: str
    access: Mapping[str, bool]

    def checked(self, places: Mapping[str, Place | None]) -> dict[str, Place]:
        """The models that are there, with which windows have been found to be possible.

        Args:
            places: Models by role.

        Raises:
            UserError: Windows are too long, or a model that the user named is not there.
        """
        found = {}
        for role, place in places.items():
            if place is None:
                continue
            try:
                config = load_config(place.source, **self._access_to(place))
            except UserError as error:
                _leave_out(place, error)
                continue
            for window in self.windows if self.texts else ():
                check_windows(config, window, self.stride, self.tokens)
            found[role] = place
        return found

    def measured(
        self,
        places: Mapping[str, Place],
        *,
        speed: bool,
        save: Callable[[Mapping[str, Any]], Any],
    ) -> dict[str, Any]:
        """Entries of models by role; see `lit_prune.evaluation.record`.

        Args:
            places: What `checked` gave.
            speed: Whether to measure speed and memory, too.
            save: Called with the entries so far whenever a part is done.
        """
        models: dict[str, Any] = {}
        entries: dict[str, Any] = {"model": None, "dense": None}
        for role, place in places.items():
            found = self._loaded(place)
            if found is None:
                continue
            entries[role] = self._entry(place, *found)
            save(entries)
            if self.tasks["tasks"]:
                self._add_tasks(place, entries[role], *found)
                save(entries)
            if speed:
                models[role] = found[0]
            del found
            gc.collect()
        if models:
            self._add_speed(entries, models, places)
        return entries

    def _access_to(self, place: Place) -> dict[str, Any]:
        """Code of a repository runs only if the user has named that very model."""
        trusted = self.access["trust_remote_code"] and place.named
        return {**self.access, "trust_remote_code": trusted}

    def _loaded(self, place: Place) -> tuple[Any, Any] | None:
        """A model and its tokenizer; None, with a note, for one of a lineage that can't be had."""
        try:
            access = self._access_to(place)
            model, tokenizer = load_pretrained(place.source, dtype=DTYPES[self.dtype], **access)
            if tokenizer is None:
                raise UserError(
                    f"expected a tokenizer with {place.name}, got none; put its files there"
                )
            if place.digest is not None and not self._is_same(model, place):
                raise UserError(
                    f"expected the model that was pruned, got other weights at {place.source}"
                )
        except UserError as error:
            _leave_out(place, error)
            return None
        return model.to(self.device), tokenizer

    def _is_same(self, model: Any, place: Place) -> bool:
        if digest_of(model) == place.digest:
            return True
        if self.dtype != "float16":
            return False
        # its digest is of other numbers than that of float32 or bfloat16
        stored, _ = load_pretrained(place.source, dtype=None, **self._access_to(place))
        return digest_of(stored) == place.digest

    def _entry(self, place: Place, model: Any, tokenizer: Any) -> dict[str, Any]:
        """All that is measured of a model alone, but tasks."""
        found = resolve(place.source)
        folder = found.place if found.local and found.gguf is None else None
        perplexities = [
            text_perplexity(
                model,
                tokenizer,
                text,
                window=window,
                stride=self.stride,
                tokens=self.tokens,
                progress=f"{place.name}: perplexity of {text.name}, windows of {window}",
            )
            for text in self.texts
            for window in self.windows
        ]
        return {
            "source": place.name,
            "digest": digest_of(model),
            "files": fingerprint(folder) if folder is not None else None,
            "cost": cost(model, _structure(model, folder), checkpoint=folder),
            "perplexity": perplexities,
            "tasks": None,
            "speed": None,
        }

    def _add_tasks(self, place: Place, entry: dict[str, Any], model: Any, tokenizer: Any) -> None:
        try:
            entry["tasks"] = zeroshot.evaluate_tasks(model, tokenizer, **self.tasks)
        except UserError as error:
            if all(each["nll"] is not None for each in entry["perplexity"]):
                raise
            note(f"{place.name}: no tasks: {error}")  # of a model whose figures are no numbers

    def _add_speed(
        self, entries: dict[str, Any], models: dict[str, Any], places: Mapping[str, Place]
    ) -> None:
        timed = generation_speed(models, progress="speed, the models taking turns")
        models.clear()
        gc.collect()
        against = entries["dense"] and entries["dense"]["digest"]
        for role, each in timed.items():
            place = places[role]
            access = self._access_to(place)
            peak = footprint(place.source, dtype=self.dtype, device=self.device, **access)
            entries[role]["speed"] = {**each, "memory": peak, "dense": against}


def _leave_out(place: Place, error: UserError) -> None:
    """Say why a model of a lineage is not compared with; raise for one that the user named."""
    if place.named:
        raise error
    note(
        f"{place.name}, which this model was pruned from, is left out: {error}; or name one with "
        "--dense"
    )


def _structure(model: Any, folder: str | None) -> Structure:
    """Where a model's axes lie; an export has their widths written down."""
    layout = read_lineage(folder)["layout"] if folder is not None else None
    if layout is None:
        return Structure.of(model)
    return Structure.of(model, Widths(layout["widths"]["shared"], layout["widths"]["layers"]))


def device_of(name: str) -> str:
    """A device by name; of "auto", a GPU where there is one.

    Args:
        name: What the user gave.

    Raises:
        UserError: This machine has none such.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        first = str(error).partition("\n")[0]
        raise UserError(f"expected a device of this machine, got {name!r}: {first}") from error
    return name
