"""`lit-prune export`: the checkpoint of an interrupted or finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lit_prune.cli.guard import say
from lit_prune.console import stdout_console
from lit_prune.errors import UserError
from lit_prune.export.describe import card_of
from lit_prune.files import folder_errors, written_at_once
from lit_prune.fitting.restore import model_options, restore
from lit_prune.module import PrunableLM
from lit_prune.recovery.adapter_files import save_adapter
from lit_prune.recovery.lora import lora_parameters, remove_lora
from lit_prune.reporting.report import load_lines
from lit_prune.structure.counting import count_actual

BASE, ADAPTER = "base", "adapter"
_ADAPTER_APART = f"""
## The adapter

What the recovery learned is not in these weights but in the adapter beside this folder:

```python
from peft import PeftModel
model = PeftModel.from_pretrained(model, "{ADAPTER}")
```
"""


def export_run(
    run: str,
    *,
    out: str,
    merge: bool = True,
    pretrained: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write the checkpoint of an interrupted or finished run.

    Args:
        run: The run's folder, the --trainer.default_root_dir of the fit.
        out: The folder to make.
        merge: Merge the adapter; false writes the pruned model to OUT/base and the adapter to
            OUT/adapter, in peft's format.
        pretrained: The dense model, if it is not any more where the run found it.
        trust_remote_code: Let code from the dense model's repository run.
    """
    target, folder = Path(out).expanduser(), Path(run).expanduser()
    if target.is_symlink() or target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UserError(f"expected a new folder as --out, got {out}, which exists; choose another")
    options = model_options(folder)
    if options.get("trust_remote_code") and not trust_remote_code:
        raise UserError(
            f"expected a model that transformers knows, got the run of {options['pretrained']}, "
            "which brings code of its own; read it, then pass --trust_remote_code true"
        )
    changes: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if pretrained is not None:
        changes["pretrained"] = pretrained
    module, steps = restore(folder, say, **changes)
    steps -= module.first_step  # before the last cut
    if module.phase == "dense":
        raise UserError(
            f"expected a run whose model is pruned, got {run}, stopped before the cut; go on with "
            f"lit-prune fit --config {folder / 'config.yaml'} --ckpt_path last"
        )
    report = _report(folder, module, steps)
    if merge:
        module.finish()
        module.report = report
        module.export(target, card_of(module, target.name))
        lines = load_lines(target, stock=module.is_stock)
    else:
        _export_apart(module, report, run, target)
        lines = load_lines(target / BASE, stock=module.is_stock) + (
            "\nfrom peft import PeftModel\n"
            f"model = PeftModel.from_pretrained(model, {json.dumps(str(target / ADAPTER))})"
        )
    console = stdout_console()
    for line in ("load it in plain transformers:", *lines.splitlines()):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _export_apart(
    module: PrunableLM, report: dict[str, Any] | None, run: str, target: Path
) -> None:
    """The pruned model and its adapter, in one folder that appears at once."""
    if module.phase != "recovery":
        raise UserError(
            f"expected a run with an adapter for --merge false, got {run} without; leave it out"
        )
    if report is not None:  # the base is what was measured before recovery
        models = {name: part for name, part in report["models"].items() if name != "recovered"}
        report = {**report, "models": models}
    target = target.resolve()
    with folder_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with written_at_once(target) as folder:
            save_adapter(module.model, folder / ADAPTER, base=BASE)
            remove_lora(module.model)
            module.report = report
            module.export(folder / BASE, card_of(module, BASE) + _ADAPTER_APART)


def _report(run: Path, module: PrunableLM, steps: int) -> dict[str, Any] | None:
    """The run's report, if it is of this very model; an earlier fit may have left another."""
    try:
        report = json.loads((run / "report.json").read_text(encoding="utf-8"))
        final = report["models"]["recovered" if steps else "pruned"]
        found = (final["parameters"], report["sparsity"], report["protocol"]["recovery_steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    sparsity = module.history[-1]["sparsity"] if module.history else None
    adapter = sum(factor.numel() for factor in lora_parameters(module.model))
    parameters = count_actual(module.model, module.structure) - adapter
    return report if found == (parameters, sparsity, steps) else None
