from __future__ import annotations

import subprocess
import sys

import torch

from lit_prune.scores.random import generator_for, random_scores, seed_of
from lit_prune.structure import Structure
from tests.structure.tiny import tiny_model

WIDTHS = Structure.of(tiny_model("llama")).widths


def test_every_unit_of_every_layer_has_a_score() -> None:
    scores = random_scores(WIDTHS, ["channel", "group", "query", "value"], 0)
    shapes = {axis: [tuple(x.shape) for x in layers] for axis, layers in scores.items()}
    assert shapes == {
        "channel": [(20,)] * 3,
        "group": [(2,)] * 3,
        "query": [(2, 3)] * 3,
        "value": [(2, 8)] * 3,
    }
    for layers in scores.values():
        assert all(x.dtype == torch.float32 and x.device.type == "cpu" for x in layers)
    assert len(torch.cat(scores["channel"]).unique()) == 60  # layers differ


def test_a_seed_fixes_the_scores_whatever_else_there_is() -> None:
    one = random_scores(WIDTHS, ["channel"], 3)["channel"]
    torch.manual_seed(9)
    torch.set_default_dtype(torch.bfloat16)
    try:
        two = random_scores(WIDTHS, ["group", "channel"], 3)["channel"]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    for seed in (4, 3 + 2**32):  # the generator of the CPU looks at 32 bits
        other = random_scores(WIDTHS, ["channel"], seed)["channel"]
        assert not torch.equal(one[0], other[0])


def test_another_process_draws_the_same() -> None:
    code = (
        "from lit_prune.scores.random import generator_for; import torch;"
        "print(torch.rand(3, generator=generator_for('cpu', 7, 'a.weight')).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    expected = torch.rand(3, generator=generator_for("cpu", 7, "a.weight")).tolist()
    assert done.stdout.strip() == str(expected)


def test_keys_are_told_apart() -> None:
    keys = [(1, 23, "a"), (12, 3, "a"), (1, 23, "b"), (1, 2, "3a")]
    draws = {torch.rand(1, generator=generator_for("cpu", *key)).item() for key in keys}
    assert len(draws) == len(keys)


def test_scores_are_even() -> None:
    wide = Structure.of(tiny_model("llama", intermediate_size=4000)).widths
    values = torch.cat(random_scores(wide, ["channel"], 0)["channel"])
    share = torch.histc(values, 4, 0, 1) / len(values)
    assert torch.allclose(share, torch.full((4,), 0.25), atol=0.02)


def test_turns_of_a_seed_are_no_other_seeds() -> None:
    assert [seed_of(seed, 0) for seed in (0, 5)] == [0, 5]
    found = [seed_of(seed, turn) for seed in range(20) for turn in range(20)]
    assert len({number % 2**32 for number in found}) == 400  # the bits that generators look at
    assert max(found) < 2**63
