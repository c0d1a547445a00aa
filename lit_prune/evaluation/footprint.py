"""Peak memory of inference, measured in a fresh process, which runs this module."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lit_prune.errors import UserError
from lit_prune.evaluation.speed import decode, prefill, random_prompts
from lit_prune.heap import give_back
from lit_prune.loading.pretrained import load_pretrained

_STATUS = Path("/proc/self/status")
_RESTART = Path("/proc/self/clear_refs")


def footprint(
    source: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    batch_size: int = 1,
    prompt: int = 256,
    new_tokens: int = 16,
    trust_remote_code: bool = False,
    token: bool = False,
) -> dict[str, Any]:
    """Peak memory of a process that loads a model and generates with it.

    On a CPU the figures are resident bytes of the whole process, with Python and its libraries, so
    that `baseline_bytes`, those of the same process before it opens the model, are to be taken off
    for what the model needs. Loading has a peak of its own, which depends on the file's form more
    than on the model (a GGUF file is unpacked), so the peak of inference is told apart where the
    system can restart it (Linux). On CUDA they are the bytes of torch's tensors on the device.

    Args:
        source: See `lit_prune.loading.pretrained.load_pretrained`.
        dtype: Name of the parameters' dtype; "auto" for the checkpoint's.
        device: Where it runs.
        batch_size: Prompts at once.
        prompt: Tokens of a prompt.
        new_tokens: Tokens to write after it.
        trust_remote_code: Whether code from the model's repository may run.
        token: Whether the stored hub token is sent.

    Returns:
        `peak_bytes` (of the prefill and the decoding), `load_peak_bytes` (from the start until the
        model is there), `baseline_bytes`, and `how` they were measured; or `{"not_run": why}`.
    """
    task = {
        "source": source,
        "dtype": dtype,
        "device": device,
        "batch_size": batch_size,
        "prompt": prompt,
        "new_tokens": new_tokens,
        "access": {"trust_remote_code": trust_remote_code, "token": token},
    }
    command = [sys.executable, "-m", "lit_prune.evaluation.footprint", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        return {"not_run": f"signal {-done.returncode} ended the process; was memory short?"}
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"not_run": said[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def measure(task: Mapping[str, Any]) -> dict[str, Any]:
    """Load a model, generate with it, and read this process's memory.

    Args:
        task: The arguments of `footprint`, those of access under `access`.

    Returns:
        What `footprint` returns.

    Raises:
        UserError: The model can't be loaded.
    """
    _restart(task["device"])
    baseline = _peak(task["device"])
    dtype = None if task["dtype"] == "auto" else getattr(torch, task["dtype"])
    model, _ = load_pretrained(task["source"], dtype=dtype, **task["access"])
    model.to(task["device"])
    loaded = _peak(task["device"])
    restarted = _restart(task["device"])
    tokens = random_prompts([model], task["batch_size"], task["prompt"], task["new_tokens"])
    with torch.no_grad():
        first, cache = prefill(model, tokens.to(task["device"]))
        decode(model, first, cache, task["new_tokens"])
    size, length = tokens.shape
    what = "tensors on the device" if _on_cuda(task["device"]) else "resident, the whole process"
    when = "after loading" if restarted else "loading included"
    return {
        "peak_bytes": _peak(task["device"]),
        "load_peak_bytes": loaded,
        "baseline_bytes": baseline,
        "how": f"{what}, {when}: prefill of {size} x {length} tokens, then {task['new_tokens']} "
        "steps; the baseline is before the model is opened",
    }


def _on_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def _peak(device: str) -> int:
    """The most bytes since the last restart."""
    if _on_cuda(device):
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.is_file():
        line = next(x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _restart(device: str) -> bool:
    """Let the peak start anew from what is in use now; whether that was possible."""
    if _on_cuda(device):
        torch.cuda.reset_peak_memory_stats(device)
        return True
    gc.collect()
    give_back()
    try:
        _RESTART.write_text("5")
    except OSError:
        return False
    return True


def main() -> None:
    """Measure what the argument, JSON, asks for, and print JSON."""
    try:
        print(json.dumps(measure(json.loads(sys.argv[1]))))
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
