"""ExportCheckpoint: what it refuses before any time is spent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from lit_prune import PrunableLM
from lit_prune.callbacks import ExportCheckpoint, FASPPruning
from lit_prune.errors import UserError
from tests.structure.tiny import tiny_model
from tests.tiny_fit import CutAt, Watch, make_data, make_tokenizer, make_trainer


def own_code(name: str) -> Any:
    """A model of a family that is known, in a class that transformers has not."""
    model: Any = tiny_model("llama")
    model.__class__ = type(name, (LlamaForCausalLM,), {})
    return model


@pytest.mark.parametrize("name", ["MineForCausalLM", "LlamaForCausalLM"])
@pytest.mark.parametrize("step", [0, 2])
def test_a_class_with_code_of_its_own_is_refused_at_the_start(
    tmp_path: Path, name: str, step: int
) -> None:
    module = PrunableLM.from_model(own_code(name), make_tokenizer())
    watch, cut = Watch(), FASPPruning(samples=4, length=16) if step == 0 else CutAt(step)
    trainer = make_trainer(tmp_path, [cut, watch, ExportCheckpoint()], max_steps=3)
    with pytest.raises(UserError, match=f"class of transformers for the export, got {name}") as e:
        trainer.fit(module, datamodule=make_data(tmp_path))
    assert "\n" not in str(e.value)
    assert (module.phase, watch.rates) == ("dense", [])


def test_it_is_pruned_where_nothing_is_exported(tmp_path: Path) -> None:
    module = PrunableLM.from_model(own_code("MineForCausalLM"), make_tokenizer())
    trainer = make_trainer(tmp_path, [CutAt(0)], max_steps=1)
    trainer.fit(module, datamodule=make_data(tmp_path))
    assert module.phase == "pruned"
