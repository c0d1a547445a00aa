from __future__ import annotations

from typing import Any

import pytest
import torch

from lit_prune.evaluation.sizes import (
    attended,
    cache_bytes,
    cached,
    checkpoint_bytes,
    weight_bytes,
)
from tests.evaluation.small import tiny_model as small_model
from tests.structure.tiny import tiny_model


def test_only_on_meta_may_a_forward_pass_be_impossible() -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("shapes cannot be multiplied")

    model: Any = tiny_model("llama")
    model.model.layers[1].mlp.forward = fail
    with pytest.raises(RuntimeError, match="shapes cannot"):
        cached(model)
    assert cached(model.to("meta")) is None
    assert cache_bytes(model, 3) is None
    assert attended(model, 3) == 3


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2"])
def test_what_is_kept_and_looked_at_is_in_the_real_cache(name: str) -> None:
    model: Any = tiny_model(name, attn_implementation="eager")
    for length in (1, 3, 4, 5, 6, 9):  # the windows are of 5
        with torch.no_grad():
            output = model(
                input_ids=torch.full((1, length), 7), use_cache=True, output_attentions=True
            )
        kept = [part for x in output.past_key_values.layers for part in (x.keys, x.values)]
        assert cache_bytes(model, length) == sum(p.numel() * p.element_size() for p in kept)
        looked = [int((weights[0, 0, -1] > 0).sum()) for weights in output.attentions]
        assert attended(model, length) == looked


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_of_weights_in_memory_and_on_disk(tmp_path, tied: bool):
    model = small_model(tied).bfloat16()
    model.save_pretrained(tmp_path)
    (tmp_path / "other.bin").write_bytes(b"123")
    expected = sum({id(p): p.numel() * 2 for p in model.parameters()}.values())
    untied = 2 * 61 * 16 * 2 + (expected - (1 if tied else 2) * 61 * 16 * 2)
    assert weight_bytes(model) == expected == untied - tied * 61 * 16 * 2
    header = checkpoint_bytes(tmp_path) - expected
    assert 0 < header < 4096
