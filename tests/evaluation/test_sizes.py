from __future__ import annotations

from typing import Any

import pytest

from lit_prune.evaluation.sizes import cached, checkpoint_bytes, weight_bytes
from tests.evaluation.small import tiny_model as small_model
from tests.structure.tiny import tiny_model


def test_only_on_meta_may_a_forward_pass_be_impossible() -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("shapes cannot be multiplied")

    model: Any = tiny_model("llama")
    model.model.layers[1].mlp.forward = fail
    with pytest.raises(RuntimeError, match="shapes cannot"):
        cached(model, 3)
    assert cached(model.to("meta"), 3) is None


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
