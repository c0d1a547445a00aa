"""`lit-prune evaluate`: what a model does, costs and lost, beside the model it was pruned from."""

from __future__ import annotations

import gc
import json as json_text
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lit_prune.cli.compare import print_comparison
from lit_prune.cli.guard import say
from lit_prune.dtypes import DTYPES
from lit_prune.errors import UserError
from lit_prune.evaluation import tasks as zeroshot
from lit_prune.evaluation.cost import cost
from lit_prune.evaluation.footprint import footprint
from lit_prune.evaluation.record import FILE, added, read_record, write_record
from lit_prune.evaluation.speed import generation_speed
from lit_prune.evaluation.texts import read_text, text_perplexity
from lit_prune.export import read_lineage
from lit_prune.notes import noting
from lit_prune.opening import digest_of
from lit_prune.pretrained import load_pretrained, resolve
from lit_prune.reporting.card import public_name
from lit_prune.reporting.report import versions
from lit_prune.structure import Structure, Widths

AUTO, NONE = "auto", "none"


@dataclass(frozen=True)
class Place:
    """Where a model is and where its figures go.

    Attributes:
        source: As of `lit_prune.pretrained.load_pretrained`.
        name: What it is called, without folders of this machine.
        record: The file of its figures, or None where it has no folder of its own.
    """

    source: str
    name: str
    record: Path | None = None

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


def evaluate_model(
    model: str,
    *,
    dense: str = AUTO,
    texts: list[str] = ["wikitext2"],  # noqa: B006 - the command line shows the default
    windows: list[int] = [2048],  # noqa: B006
    stride: int | None = None,
    tokens: int | None = None,
    field: str = "text",
    tasks: list[str] = [],  # noqa: B006
    task_data: str | None = None,
    fewshot: int | None = None,
    limit: int | None = None,
    speed: bool = True,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "bfloat16",
    device: str = AUTO,
    trust_remote_code: bool = False,
    token: bool = False,
    out: str | None = None,
    json: bool = False,
) -> dict[str, Any]:
    """Measure perplexity, tasks, cost and speed of a model, and of the model it was pruned from.

    Args:
        model: A run's folder, a checkpoint's, a hub id, a .gguf file or
            embedded:smollm2-135m-instruct.
        dense: What to compare with: a model, auto for the one that MODEL was pruned from, or none.
        texts: Texts for perplexity: wikitext2, ptb, c4, or what --data.train of fit takes; its test
            split where it is of the hub.
        windows: Tokens of a window, each length a figure of its own.
        stride: Tokens between windows; by default they don't overlap.
        tokens: Only this many from the start of each text.
        field: Field of .jsonl and hub records that holds the text.
        tasks: Tasks of lm-eval, or papers for the seven that papers on pruning average.
        task_data: Folder of one .jsonl per task (and split), instead of data of the hub.
        fewshot: Examples before each item, instead of the task's own number.
        limit: Only so many items of each task.
        speed: Measure speed and memory, the models taking turns.
        dtype: Type of the weights; auto for the checkpoint's.
        device: Where the models run, such as cuda or cpu; auto for a GPU where there is one.
        trust_remote_code: Let code from the models' repositories run.
        token: Send the stored hub token, as gated models need.
        out: File for the figures, added to what it has; by default evaluation.json in the folder.
        json: Print JSON instead of a table.

    Returns:
        What is written: see `lit_prune.evaluation.record`.
    """
    place = Place.of(model)
    against = _dense_of(place, dense)
    path = Path(out).expanduser() if out else place.record
    earlier = read_record(path) if path is not None and path.is_file() else None
    if tasks:
        zeroshot.task_names(tasks)  # unknown ones are refused before anything is measured
    asked = _Asked(
        texts=[read_text(name, field) for name in texts],
        windows=windows,
        stride=stride,
        tokens=tokens,
        tasks={"tasks": tasks, "data": task_data, "fewshot": fewshot, "limit": limit},
        dtype=dtype,
        device=_device(device),
        access={"trust_remote_code": trust_remote_code, "token": token},
    )
    with noting() as notes:
        entries = asked.measured({"model": place, "dense": against}, speed)
    record = added({**entries, "versions": versions(), "warnings": notes}, earlier)
    if path is not None:
        write_record(record, path)
    if json:
        print(json_text.dumps(record, indent=2))
    else:
        print_comparison([(place.name, record)])
        say(f"written to {path}" if path else "not written: give --out FILE to keep the figures")
    return record


def _dense_of(place: Place, wanted: str) -> Place | None:
    """The model to compare with, if there is one."""
    if wanted not in (AUTO, NONE):
        named = Place.of(wanted)
        resolve(named.source)  # refused before anything is measured
        return named
    found = resolve(place.source)
    if wanted == NONE or not found.local or found.gguf is not None:
        return None
    lineage = read_lineage(found.place)["lineage"]
    base = str(lineage[-1].get("base", "")) if lineage else ""
    if not base:
        return None
    try:
        resolve(base)
    except UserError:
        say(f"{base}, which this model was pruned from, is not there: --dense names it elsewhere")
        return None
    return Place.of(base)


@dataclass(frozen=True)
class _Asked:
    """What shall be measured of each model."""

    texts: Sequence[Any]
    windows: Sequence[int]
    stride: int | None
    tokens: int | None
    tasks: Mapping[str, Any]
    dtype: str
    device: str
    access: Mapping[str, bool]

    def measured(self, places: Mapping[str, Place | None], speed: bool) -> dict[str, Any]:
        """Entries of models by role."""
        models: dict[str, Any] = {}
        entries: dict[str, Any] = dict.fromkeys(places)
        there = {role: place for role, place in places.items() if place is not None}
        for role, place in there.items():
            model, entries[role] = self._entry(place)
            if speed:
                models[role] = model
            del model
            gc.collect()
        if models:
            found = generation_speed(models, progress="speed, the models taking turns")
            models.clear()
            for role, each in found.items():
                source = there[role].source
                peak = footprint(source, dtype=self.dtype, device=self.device, **self.access)
                entries[role]["speed"] = {**each, "memory": peak}
        return entries

    def _entry(self, place: Place) -> tuple[Any, dict[str, Any]]:
        """A model, and all that is measured of it alone."""
        dtype = DTYPES[self.dtype]
        model, tokenizer = load_pretrained(
            place.source,
            dtype=dtype,
            trust_remote_code=self.access["trust_remote_code"],
            token=self.access["token"],
        )
        model = model.to(self.device)
        if tokenizer is None:
            raise UserError(
                f"expected a tokenizer with {place.name}, got none; put its files there"
            )
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
        found = resolve(place.source)
        folder = found.place if found.local and found.gguf is None else None
        tasks = None
        if self.tasks["tasks"]:
            tasks = zeroshot.evaluate_tasks(model, tokenizer, **self.tasks)
        return model, {
            "source": place.name,
            "digest": digest_of(model),
            "cost": cost(model, _structure(model, place.source), checkpoint=folder),
            "perplexity": perplexities,
            "tasks": tasks,
            "speed": None,
        }


def _structure(model: Any, source: str) -> Structure:
    """Where a model's axes lie; an export has their widths written down."""
    found = resolve(source)
    layout = read_lineage(found.place)["layout"] if found.local and found.gguf is None else None
    if layout is None:
        return Structure.of(model)
    return Structure.of(model, Widths(layout["widths"]["shared"], layout["widths"]["layers"]))


def _device(name: str) -> str:
    if name == AUTO:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        first = str(error).partition("\n")[0]
        raise UserError(f"expected a device of this machine, got {name!r}: {first}") from error
    return name
