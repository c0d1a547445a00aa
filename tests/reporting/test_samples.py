"""What models write: greedy, token by token, and nothing else changes."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from lit_prune.reporting.samples import NEW_TOKENS, PROMPTS, continuations
from lit_prune.structure import Structure, cut
from tests.structure.tiny import tiny_model
from tests.tiny_fit import make_tokenizer, uneven


def literal(model: Any, tokenizer: Any, prompt: str, number: int) -> list[int]:
    """The most likely tokens, each from a pass over all of the text."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        for _ in range(number):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            if int(logits.argmax()) == tokenizer.eos_token_id:
                break
            ids = [*ids, int(logits.argmax())]
    return ids[start:]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "gemma2", "qwen2"])
@pytest.mark.parametrize("pruned", [False, True])
def test_they_are_the_most_likely_tokens(family: str, pruned: bool):
    model, tokenizer = tiny_model(family).eval(), make_tokenizer()
    if pruned:
        structure = Structure.of(model)
        cut(model, structure, uneven(structure))
    prompt = "w3 w9 w4"
    found = continuations(model, tokenizer, [prompt])
    assert list(found) == [prompt]
    expected = literal(model, tokenizer, prompt, NEW_TOKENS)
    assert found[prompt] == tokenizer.decode(expected, skip_special_tokens=True)
    assert expected


def test_a_text_ends_where_the_model_does():
    model, tokenizer = tiny_model("gpt2"), make_tokenizer()  # 64 positions
    found = continuations(model, tokenizer, [" ".join(["w5"] * n) for n in (60, 64, 70)])
    lengths = [len(text.split()) for text in found.values()]
    assert lengths[0] <= 4
    assert lengths[1:] == [0, 0]
    first = literal(model.eval(), tokenizer, "w7 w8", 1)[0]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(first)
    assert continuations(model, tokenizer, ["w7 w8"]) == {"w7 w8": ""}


def test_nothing_else_changes():
    model: Any = tiny_model("llama").train()
    tokenizer = make_tokenizer()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())  # type: ignore[index]
    config = model.config.to_dict()
    continuations(model, tokenizer, PROMPTS)
    assert [module.training for module in model.modules()] == modes
    assert model.config.to_dict() == config
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert all(parameter.grad is None for parameter in model.parameters())
