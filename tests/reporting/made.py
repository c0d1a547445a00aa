"""A report with everything in it, of numbers that are easy to recognise."""

from __future__ import annotations

from typing import Any

from lit_prune.reporting.report import build_report, model_entry

EDGES = [-4 + i / 10 for i in range(41)]


def entry(perplexity: Any, parameters: int, speed: float | None) -> dict[str, Any]:
    return model_entry(
        perplexity=perplexity,
        parameters=parameters,
        decoder_parameters=parameters - 7,
        weight_bytes=2 * parameters,
        tokens_per_second=speed,
    )


def tasks(value: float) -> dict[str, Any]:
    return {
        "protocol": {"harness": "lm-eval 9.9", "limit": 17, "data": "hub"},
        "tasks": {
            "piqa": {"acc": value, "acc_stderr": 0.0123, "acc_norm": value / 2, "items": 17},
            "mmlu": {"not_run": "no few-shot split"},
        },
        "averages": {"acc": {"value": value, "tasks": ["piqa"]}},
    }


def full_report(**changes: Any) -> dict[str, Any]:
    """A report of a run with recovery."""
    parts: dict[str, Any] = {
        "protocol": {"text": "sotu", "window": 2048, "tokens": 16376, "dtype": "bfloat16"},
        "sparsity": {"target": 0.2, "decoder": 0.20017, "total": 0.15834},
        "models": {
            "dense": entry(20.1234, 134_515_008, 911.2),
            "pruned": entry(26.5678, 113_214_017, 1_033.4),
            "recovered": entry(22.3456, 113_214_017, 1_033.4),
        },
        "seconds": {"calibrate_and_prune": 12.34, "recover": 101.5},
        "method": "FASP",
        "options": {"sparsity": 0.2, "axes": ["channel"], "smoothing": False, "multiple": 0},
        "warnings": ["batches were halved"],
    }
    details: dict[str, Any] = {
        "pretrained": "HuggingFaceTB/SmolLM2-135M",
        "stock": False,
        "seed": 4711,
        "layers": {
            "channel": {"dense": [1536, 1536, 1536], "kept": [1100, 1152, 1536]},
            "group": {"dense": [3, 3, 3], "kept": [3, 3, 3]},
            "hidden": {"dense": [576], "kept": [512]},
        },
        "curves": {
            "train/recovery_loss": [[0, 3.5], [1, None], [2, 3.25]],
            "train/kl": [[0, 0.5], [1, 0.25]],
            "masks/sparsity": [[0, 0.0], [1, 0.19]],
            "prune/sparsity": [[0, 0.20017]],
            "masks/lambda_1": [[0, 0.0], [1, -0.1]],
            "rate": [[0, 1e-3], [1, 2e-3]],
        },
        "findings": {
            "scores": {
                "channel": {
                    "log10": True,
                    "edges": EDGES,
                    "kept": list(range(40)),
                    "removed": list(range(40, 0, -1)),
                    "zeros": 5,
                }
            },
            "tasks": {"dense": tasks(0.6543), "recovered": tasks(0.5432)},
        },
        "generations": [
            {"prompt": "Once upon", "dense": "a time", "pruned": "the the", "recovered": ""}
        ],
        "config": {"model": {"pretrained": "HuggingFaceTB/SmolLM2-135M"}, "seed_everything": 4711},
    }
    for name in [name for name in changes if name in details]:
        details[name] = changes.pop(name)
    return build_report(**{**parts, **changes}, details=details)
