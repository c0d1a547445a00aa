"""How fast models are, measured in turns."""

from __future__ import annotations

import inspect
import platform
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import UserError
from lit_prune.heap import give_back
from lit_prune.memory import fits
from lit_prune.modes import evaluating
from lit_prune.notes import note
from lit_prune.progress import track

_LEAST_ROUNDS = 5
_SEED = 0


def throughput(
    models: Mapping[str, nn.Module], input_ids: Tensor, rounds: int = 5
) -> dict[str, list[float]]:
    """Tokens a second of a forward pass, the models taking turns.

    Taking turns spreads a disturbance of the machine over all models; each has a warm-up first.

    Args:
        models: Name -> causal LM.
        input_ids: Tokens [batch, length] of every pass.
        rounds: Passes per model.

    Returns:
        Name -> tokens/s of each round.
    """
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            device = next(model.parameters()).device
            tokens = input_ids.to(device)
            with evaluating(model), torch.no_grad():
                _synchronize(device)
                start = time.perf_counter()
                model(input_ids=tokens, use_cache=False)
                _synchronize(device)
            if number:
                speeds[name].append(tokens.numel() / (time.perf_counter() - start))
    return speeds


def median_speed(speeds: Sequence[float]) -> float:
    """The middle of `throughput`'s rounds, tokens/s."""
    return statistics.median(speeds)


@dataclass
class _Taken:
    """Seconds of a model's rounds with a batch size, or why there are none.

    Attributes:
        prefill: Of the whole prefill.
        step: Of a step of decode.
        failed: Why it was given up.
    """

    prefill: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    failed: str | None = None


def generation_speed(
    models: Mapping[str, nn.Module],
    *,
    batch_sizes: Sequence[int] = (1, 8),
    prompt: int = 256,
    new_tokens: int = 16,
    rounds: int = 5,
    progress: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Speed and latency of generation: of reading a prompt, and of writing token after token.

    As in transformers' `generate`: `prefill` is one forward pass of the whole prompt that fills
    the model's own KV cache and makes the logits of its last token alone (of all, where the class
    can't); `decode` is `new_tokens` passes of one token each with that cache, greedy, of a fixed
    length. The models take turns within each round, so that a disturbance of the machine meets
    all, and ratios are taken within a round; a round to warm up comes first. The prompt is random
    tokens of a fixed seed, the same for all models.

    Args:
        models: Name -> causal LM of transformers; "dense" is what others are compared with.
        batch_sizes: Prompts at once.
        prompt: Tokens of a prompt; fewer, with a note, where a model has fewer positions.
        new_tokens: Tokens to write.
        rounds: Rounds that count, at least 5.
        progress: What a progress bar on stderr says; None for silence.

    Returns:
        Name -> `protocol` and `batches` (for memory see
        `lit_prune.evaluation.footprint`). A batch has `prefill` and `decode`, each with the median
        and range of `tokens_per_second`, of `latency_ms` (of the whole prefill, of one step of
        decode) and of the `ratio` of tokens/s to dense in the same round, and `faster` and
        `slower`: whether all rounds were faster, or slower, than all of dense's. Those three are
        None for "dense" and without it. A batch that memory ran out with is `{"not_run": why}`.

    Raises:
        UserError: There are fewer than 5 rounds, nothing to do, or too few positions.
    """
    if rounds < _LEAST_ROUNDS or min(prompt, new_tokens, *batch_sizes, len(models)) < 1:
        raise UserError(
            f"expected models, at least {_LEAST_ROUNDS} rounds and 1 token, got {len(models)} "
            f"models, {rounds} rounds, {prompt} and {new_tokens} tokens, batches of {batch_sizes}"
        )
    prompts = random_prompts(models.values(), max(batch_sizes), prompt, new_tokens)
    prompt = prompts.shape[1]
    taken = {size: {name: _Taken() for name in models} for size in batch_sizes}
    turns = [(size, n, name) for size in batch_sizes for n in range(rounds + 1) for name in models]
    for size, number, name in track(turns, progress or "", progress is not None):
        _take_turn(models[name], prompts[:size], new_tokens, taken[size][name], counts=number > 0)
    asked = {"prompt": prompt, "new_tokens": new_tokens, "rounds": rounds}
    return {
        name: {
            "protocol": {**asked, **_protocol(model)},
            "batches": {
                str(size): _batch(each[name], each.get("dense"), prompt, size)
                for size, each in taken.items()
            },
        }
        for name, model in models.items()
    }


def random_prompts(models: Iterable[nn.Module], size: int, length: int, new_tokens: int) -> Tensor:
    """Random tokens of a fixed seed that all models know.

    Args:
        models: Causal LMs of transformers.
        size: Prompts.
        length: Tokens of each; fewer, with a note, where a model has fewer positions.
        new_tokens: Tokens that need a position after them.

    Returns:
        Token ids [size, length].

    Raises:
        UserError: A model has too few positions.
    """
    configs: list[Any] = [model.config for model in models]
    known = [getattr(config, "max_position_embeddings", None) for config in configs]
    most = min((number for number in known if number), default=length + new_tokens)
    if most <= new_tokens:
        raise UserError(
            f"expected positions for a prompt and {new_tokens} new tokens, got a model of {most}; "
            "write fewer"
        )
    if most < length + new_tokens:
        length = most - new_tokens
        note(f"prompts have {length} tokens, since a model has {most} positions")
    generator = torch.Generator().manual_seed(_SEED)
    vocabulary = min(config.vocab_size for config in configs)
    return torch.randint(vocabulary, (size, length), generator=generator)


def _take_turn(
    model: nn.Module, prompts: Tensor, new_tokens: int, taken: _Taken, *, counts: bool
) -> None:
    """Let a model generate once, unless memory ran out with this batch size before."""
    if taken.failed is None:
        found: list[tuple[float, float]] = []
        if not fits(lambda: found.append(_timed(model, prompts, new_tokens))):
            taken.failed = (
                f"memory ran out with {len(prompts)} prompts of {prompts.shape[1]} tokens"
            )
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        elif counts:
            taken.prefill.append(found[0][0])
            taken.step.append(found[0][1] / new_tokens)
    give_back()  # so that none finds what another has left


def _timed(model: Any, prompts: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of the prefill and of the decoding."""
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        tokens = prompts.to(device)
        _synchronize(device)
        start = time.perf_counter()
        token, cache = prefill(model, tokens)
        _synchronize(device)
        middle = time.perf_counter()
        decode(model, token, cache, new_tokens)
        _synchronize(device)
        return middle - start, time.perf_counter() - middle


def prefill(model: Any, tokens: Tensor) -> tuple[Tensor, Any]:
    """Read prompts into a fresh KV cache of the model's own kind.

    Args:
        model: A causal LM of transformers.
        tokens: Token ids [batch, length].

    Returns:
        The likeliest next tokens [batch, 1], and the cache.
    """
    last = {"logits_to_keep": 1} if _keeps_last(model) else {}
    output = model(input_ids=tokens, use_cache=True, **last)
    return output.logits[:, -1:].argmax(-1), output.past_key_values


def _keeps_last(model: Any) -> bool:
    """Whether the class can leave out the other tokens' logits, as `generate` has it do."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def decode(model: Any, token: Tensor, cache: Any, steps: int) -> Tensor:
    """Write greedily, whatever the tokens are.

    Args:
        model: A causal LM of transformers.
        token: What `prefill` returned [batch, 1].
        cache: Its cache, which grows.
        steps: Passes of one token each.

    Returns:
        The first token and those that the passes found [batch, 1 + steps].
    """
    found = [token]
    for _ in range(steps):
        output = model(input_ids=found[-1], past_key_values=cache, use_cache=True)
        found.append(output.logits[:, -1:].argmax(-1))
    return torch.cat(found, 1)


def _protocol(model: Any) -> dict[str, Any]:
    weight = next(model.parameters())
    return {
        "warmup": 1,
        "threads": torch.get_num_threads(),
        "device": str(weight.device),
        "processor": _processor(weight.device),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "attention": getattr(model.config, "_attn_implementation", None),
        "turns": True,
        "tokens": f"random ids, seed {_SEED}",
        "prefill_logits": "last token" if _keeps_last(model) else "all tokens",
    }


def _processor(device: torch.device) -> str | None:
    """What the device is called, since another machine's figures are no comparison."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.processor() or platform.machine() or None


def _batch(own: _Taken, dense: _Taken | None, prompt: int, size: int) -> dict[str, Any]:
    """A batch's entry; `dense` has the same rounds, or failed."""
    if own.failed is not None:
        return {"not_run": own.failed}
    other = None if dense is None or dense is own or dense.failed is not None else dense
    return {
        "prefill": _figures(own.prefill, other and other.prefill, size * prompt),
        "decode": _figures(own.step, other and other.step, size),
    }


def _figures(own: Sequence[float], dense: Sequence[float] | None, tokens: int) -> dict[str, Any]:
    """Speed and latency of passes of so many tokens, from each round's seconds."""
    return {
        "tokens_per_second": _spread([tokens / seconds for seconds in own]),
        "latency_ms": _spread([1000 * seconds for seconds in own]),
        "ratio": dense and _spread([d / o for o, d in zip(own, dense, strict=True)]),
        "faster": dense and max(own) < min(dense),
        "slower": dense and min(own) > max(dense),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def _synchronize(device: torch.device) -> None:
    """Wait for a GPU's queue, so that the clock measures the work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
