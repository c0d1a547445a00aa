from __future__ import annotations

from typing import Any

import pytest

from lit_prune.sizes import cached
from tests.structure.tiny import tiny_model


def test_only_on_meta_may_a_forward_pass_be_impossible() -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("shapes cannot be multiplied")

    model: Any = tiny_model("llama")
    model.model.layers[1].mlp.forward = fail
    with pytest.raises(RuntimeError, match="shapes cannot"):
        cached(model, 3)
    assert cached(model.to("meta"), 3) is None
