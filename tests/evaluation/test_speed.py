"""Speeds of models that take turns."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lit_prune.errors import UserError
from lit_prune.evaluation import speed
from lit_prune.evaluation.speed import (
    decode,
    generation_speed,
    median_speed,
    prefill,
    random_prompts,
    throughput,
)
from lit_prune.structure import Structure, cut, settle
from tests.evaluation.small import tiny_model
from tests.structure.layouts import cuttable, varied
from tests.structure.tiny import FAMILIES
from tests.structure.tiny import tiny_model as family_model

PROMPT, NEW = 6, 3


def test_throughput_alternates_and_leaves_the_modes():
    models = {"dense": tiny_model().train(), "pruned": tiny_model().eval()}
    order: list[tuple[str, bool]] = []
    for name, model in models.items():
        model.register_forward_hook(
            lambda module, args, out, name=name: order.append((name, module.training))
        )
    speeds = throughput(models, torch.ones(1, 8, dtype=torch.long), rounds=3)
    assert order == [("dense", False), ("pruned", False)] * 4  # one warm-up each
    assert {name: len(values) for name, values in speeds.items()} == {"dense": 3, "pruned": 3}
    assert all(value > 0 for values in speeds.values() for value in values)
    assert (models["dense"].training, models["pruned"].training) == (True, False)


def test_median_speed_ignores_a_disturbed_round():
    assert median_speed([10.0, 1.0, 12.0]) == 10.0


class Clock:
    """Stands still but for what models add."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(speed, "time", made)
    return made


class Timed(nn.Module):
    """A model that takes as long as it is told: seconds of a pass in each round, warm-up first."""

    def __init__(self, clock: Clock, seconds: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(vocab_size=61)
        self.clock, self.seconds = clock, seconds
        self.round = -1
        self.fails: Callable[[Tensor, int], bool] = lambda tokens, number: False

    def forward(
        self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool | None = None
    ) -> Any:
        self.round += past_key_values is None
        if self.fails(input_ids, self.round):
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.clock.now += self.seconds[self.round % len(self.seconds)]
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 61), past_key_values=object())


def timed(models: dict[str, Any], sizes: tuple[int, ...] = (1,)) -> dict[str, dict[str, Any]]:
    found = generation_speed(models, batch_sizes=sizes, prompt=PROMPT, new_tokens=NEW)
    return {name: entry["batches"] for name, entry in found.items()}


def test_figures_are_those_of_the_clock(clock: Clock) -> None:
    models = {
        "small": Timed(clock, [99, 1, 2, 3, 4, 5]),
        "dense": Timed(clock, [99, 4, 4, 6, 16, 15]),
    }
    found = timed(models, (2,))
    assert found["small"]["2"]["prefill"] == {
        "tokens_per_second": {"median": 12 / 3, "low": 12 / 5, "high": 12 / 1},
        "latency_ms": {"median": 3000, "low": 1000, "high": 5000},
        "ratio": {"median": 3, "low": 2, "high": 4},  # in the same rounds: 4, 2, 2, 4, 3
        "faster": False,  # dense's fastest round took 4 s, the slowest here 5 s
        "slower": False,
    }
    decoding = found["small"]["2"]["decode"]
    assert decoding["tokens_per_second"]["median"] == 2 / 3
    assert decoding["latency_ms"] == {"median": 3000, "low": 1000, "high": 5000}
    assert found["dense"]["2"]["decode"]["latency_ms"]["median"] == 6000
    assert found["dense"]["2"]["decode"]["ratio"] is None
    assert found["dense"]["2"]["decode"]["faster"] is None


@pytest.mark.parametrize(
    ("own", "dense", "faster", "slower"),
    [
        ([1, 2, 3, 2, 1], [4, 5, 6, 5, 4], True, False),
        ([1, 2, 4, 2, 1], [4, 5, 6, 5, 4], False, False),  # they touch
        ([4, 5, 6, 5, 4], [1, 2, 3, 2, 1], False, True),
        ([3, 5, 6, 5, 4], [1, 2, 3, 2, 1], False, False),
        ([1, 1, 1, 1, 9], [2, 2, 2, 2, 2], False, False),  # one disturbed round
        ([1, 1, 1, 1, 1], [1, 1, 1, 1, 1], False, False),
    ],
)
def test_faster_is_said_only_where_ranges_do_not_overlap(
    clock: Clock, own: list[float], dense: list[float], faster: bool, slower: bool
) -> None:
    models = {"dense": Timed(clock, [0, *dense]), "pruned": Timed(clock, [0, *own])}
    for phase in timed(models)["pruned"]["1"].values():
        assert (phase["faster"], phase["slower"]) == (faster, slower)


def test_a_disturbed_round_does_not_lie(clock: Clock) -> None:
    # a machine that is ten times slower for two rounds, or for one turn of one model
    models = {
        "dense": Timed(clock, [2, 2, 20, 20, 2, 2]),
        "pruned": Timed(clock, [1, 1, 10, 10, 1, 1]),
        "same": Timed(clock, [2, 2, 20, 20, 2, 20]),
    }
    found = timed(models)
    assert found["pruned"]["1"]["prefill"]["ratio"] == {"median": 2, "low": 2, "high": 2}
    same = found["same"]["1"]["prefill"]
    assert same["ratio"] == {"median": 1, "low": 0.1, "high": 1}
    assert same["faster"] is False


def test_without_dense_there_is_nothing_to_compare_with(clock: Clock) -> None:
    found = timed({"a": Timed(clock, [1]), "b": Timed(clock, [2])})
    for batches in found.values():
        assert batches["1"]["prefill"]["ratio"] is None
        assert batches["1"]["prefill"]["faster"] is None
        assert batches["1"]["prefill"]["slower"] is None


def test_the_protocol_names_the_processor(clock: Clock) -> None:
    found = generation_speed(
        {"a": Timed(clock, [1])}, batch_sizes=(1,), prompt=PROMPT, new_tokens=NEW
    )
    assert found["a"]["protocol"]["processor"]  # what is measured on another one is another row


def test_models_take_turns_in_every_round() -> None:
    models = {"dense": tiny_model().train(), "pruned": tiny_model().eval()}
    order: list[tuple[str, int, int, bool, bool]] = []

    def note(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            batch, length = kwargs["input_ids"].shape
            order.append((name, batch, length, module.training, out.logits.requires_grad))

        return hook

    for name, model in models.items():
        model.register_forward_hook(note(name), with_kwargs=True)
        model.lm_head.train()
    found = generation_speed(models, batch_sizes=(1, 2), prompt=PROMPT, new_tokens=NEW)
    turn = [PROMPT, *[1] * NEW]
    assert order == [
        (name, batch, length, False, False)
        for batch in (1, 2)
        for _ in range(6)
        for name in models
        for length in turn
    ]
    assert (models["dense"].training, models["pruned"].training) == (True, False)
    assert models["pruned"].lm_head.training
    protocol = found["pruned"]["protocol"]
    assert (protocol["prompt"], protocol["new_tokens"]) == (PROMPT, NEW)
    assert (protocol["rounds"], protocol["warmup"], protocol["turns"]) == (5, 1, True)
    assert (protocol["dtype"], protocol["device"]) == ("float64", "cpu")
    assert protocol["prefill_logits"] == "last token"
    assert found["dense"]["batches"]["2"]["decode"]["tokens_per_second"]["low"] > 0


def too_many(tokens: Tensor, number: int) -> bool:
    return tokens.shape[0] > 2


def test_a_batch_too_large_for_memory_is_not_run(clock: Clock) -> None:
    models = {"dense": Timed(clock, [2]), "pruned": Timed(clock, [1])}
    models["dense"].fails = too_many
    found = timed(models, (1, 8))
    why = "memory ran out with 8 prompts of 6 tokens"
    assert found["dense"]["8"] == {"not_run": why}
    assert models["dense"].round == 6  # one attempt
    assert found["pruned"]["1"]["prefill"]["faster"] is True
    assert found["pruned"]["8"]["prefill"]["tokens_per_second"]["median"] == 48
    assert found["pruned"]["8"]["prefill"]["ratio"] is None
    assert found["pruned"]["8"]["prefill"]["faster"] is None


def test_memory_that_runs_out_in_the_middle(clock: Clock) -> None:
    models = {"dense": Timed(clock, [2]), "pruned": Timed(clock, [1])}
    models["pruned"].fails = lambda tokens, number: number == 3 and tokens.shape[1] == 1
    found = timed(models)
    assert list(found["pruned"]["1"]) == ["not_run"]
    assert found["dense"]["1"]["prefill"]["latency_ms"]["median"] == 2000


def test_other_errors_are_not_swallowed_and_modes_come_back(clock: Clock) -> None:
    model = Timed(clock, [1]).train()

    def fail(tokens: Tensor, number: int) -> bool:
        raise RuntimeError("shapes cannot be multiplied")

    model.fails = fail
    with pytest.raises(RuntimeError, match="shapes"):
        timed({"dense": model})
    assert model.training


def greedy(model: Any, tokens: Tensor, steps: int) -> Tensor:
    """Token after token, each time from the whole text."""
    for _ in range(steps + 1):
        logits = model(input_ids=tokens, use_cache=False).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    return tokens[:, -steps - 1 :]


@pytest.mark.parametrize("cutting", [False, True], ids=["dense", "cut"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_decoding_with_the_cache_is_decoding_without(name: str, cutting: bool) -> None:
    model: Any = family_model(name, dtype=torch.float64)
    if cutting:
        structure = Structure.of(model)
        layout = varied(structure, [axis for axis in cuttable(structure) if axis != "layer"])
        cut(model, structure, layout)
        settle(model, structure, layout)
    prompts = random_prompts([model], 2, 9, 5)  # longer than the windows of 5
    token, cache = prefill(model, prompts)
    assert isinstance(cache, DynamicCache)
    found = decode(model, token, cache, 5)
    assert torch.equal(found, greedy(model, prompts, 5))
    assert cache.get_seq_length() == 9 + 5


def test_prompts_are_fixed_and_known_to_all() -> None:
    models = [SimpleNamespace(config=SimpleNamespace(vocab_size=size)) for size in (500, 61)]
    prompts: Any = random_prompts(models, 3, 40, 8)  # pyright: ignore[reportArgumentType]
    assert prompts.shape == (3, 40)
    assert prompts.max() < 61
    assert torch.equal(prompts, random_prompts(models[:0:-1], 3, 40, 8))  # pyright: ignore


def test_a_prompt_longer_than_the_positions_is_shortened() -> None:
    models = {"dense": tiny_model()}  # 64 positions
    with pytest.warns(UserWarning, match="prompts have 61 tokens, since a model has 64 positions"):
        found = generation_speed(models, batch_sizes=(1,), prompt=62, new_tokens=3)
    assert found["dense"]["protocol"]["prompt"] == 61
    with pytest.raises(UserError, match="a prompt and 64 new tokens, got a model of 64"):
        generation_speed(models, prompt=1, new_tokens=64)


@pytest.mark.parametrize("options", [{"rounds": 4}, {"prompt": 0}, {"batch_sizes": (0,)}])
def test_too_little_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="at least 5 rounds"):
        generation_speed({"dense": tiny_model()}, **options)
    with pytest.raises(UserError, match="got 0 models"):
        generation_speed({})
