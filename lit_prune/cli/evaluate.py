"""`lit-prune evaluate`: what a model does, costs and lost, beside the model it was pruned from."""

from __future__ import annotations

import json as json_text
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lit_prune.cli.compare import print_comparison
from lit_prune.cli.guard import say
from lit_prune.errors import UserError
from lit_prune.evaluation import tasks as zeroshot
from lit_prune.evaluation.measuring import Asked, Place, device_of
from lit_prune.evaluation.record import added, check_writable, read_record, write_record
from lit_prune.evaluation.texts import read_text
from lit_prune.export import read_lineage
from lit_prune.loading.pretrained import load_config, resolve
from lit_prune.notes import note, noting
from lit_prune.reporting.report import versions

AUTO, NONE = "auto", "none"


def evaluate_model(
    model: str,
    *,
    dense: str = AUTO,
    texts: list[str] | None = None,
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
        texts: Texts for perplexity: wikitext2, ptb, ptb-validation, c4, or what --data.train of fit
            takes; its test split where it is of the hub. By default wikitext2, or none with tasks.
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
    path = Path(out).expanduser() if out else place.record
    options = {"data": task_data, "fewshot": fewshot, "limit": limit}
    texts = ([] if tasks else ["wikitext2"]) if texts is None else texts
    _check(texts, windows, tokens, tasks, options)
    with noting() as notes:
        against = _dense_of(place, dense)
        if not resolve(place.source).local:  # perhaps a mistyped folder: told before texts are
            load_config(place.source, trust_remote_code=trust_remote_code, token=token)
        earlier = read_record(path) if path is not None and path.is_file() else None
        if path is not None:
            check_writable(path)
        asked = Asked(
            texts=[read_text(name, field) for name in texts],
            windows=windows,
            stride=stride,
            tokens=tokens,
            tasks={"tasks": tasks, **options},
            dtype=dtype,
            device=device_of(device),
            access={"trust_remote_code": trust_remote_code, "token": token},
        )
        places = asked.checked({"model": place, "dense": against})

        def save(entries: Mapping[str, Any]) -> dict[str, Any]:
            new = {**entries, "versions": versions(), "warnings": list(notes)}
            record = added(new, earlier)
            if path is not None:
                write_record(record, path)
            return record

        record = save(asked.measured(places, speed=speed, save=save))
    if json:
        print(json_text.dumps(record, indent=2))
    else:
        print_comparison([(place.name, record)])
        say(f"written to {path}" if path else "not written: give --out FILE to keep the figures")
    return record


def _check(
    texts: list[str],
    windows: list[int],
    tokens: int | None,
    tasks: list[str],
    options: Mapping[str, Any],
) -> None:
    """Refuse what can't be or would not count, before anything is measured."""
    if texts and not windows:
        raise UserError("expected --windows for the texts, got none; give lengths, such as [2048]")
    if tokens is not None and tokens < 1:
        raise UserError(f"expected at least 1 of --tokens, got {tokens}")
    for name, value in options.items():
        if value is not None and not tasks:
            flag = "task_data" if name == "data" else name
            raise UserError(f"expected --tasks with --{flag}, got none; name tasks or leave it out")
    if tasks:
        zeroshot.check_options(**options, batch_size=1)
        zeroshot.task_names(tasks)  # unknown ones are refused


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
    step = lineage[-1] if lineage else {}
    base = str(step.get("base") or "")
    if not base:
        return None
    try:
        # a relative path could be the name of a model on the hub, which is another one
        known = resolve(base).local or step.get("base_local") is False
    except UserError:
        known = False
    if not known:
        note(f"{base}, which this model was pruned from, is not there: --dense names it elsewhere")
        return None
    return replace(Place.of(base), named=False, digest=step.get("base_digest"))
