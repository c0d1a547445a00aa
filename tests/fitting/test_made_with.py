"""What a callback was made with is in the checkpoint, and another method or option is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_prune import PrunableLM
from lit_prune.callbacks import FASPPruning, LoRARecovery, MagnitudePruning
from lit_prune.errors import UserError
from lit_prune.fitting.made_with import RemembersOptions, differences
from tests.method_table import METHODS
from tests.tiny_fit import make_data, make_trainer, save_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed", "ignore:Be aware that when using `ckpt_path`"
)


class Base(RemembersOptions):
    def __init__(self, rate: float = 0.5, names: Any = ("a",), seed: int = 0) -> None:
        self.rate = rate


class Derived(Base):
    def __init__(self, depth: int, rate: float = 0.1, **options: Any) -> None:
        super().__init__(rate, **options)


def test_arguments_are_remembered_with_their_defaults() -> None:
    assert Base().made_with == {"rate": 0.5, "names": ["a"], "seed": 0}
    assert Base(1, names=["b"]).made_with == {"rate": 1, "names": ["b"], "seed": 0}
    made = Derived(3, seed=7)
    made.rate = 9.0  # what became of it does not count
    assert made.made_with == {"rate": 0.1, "names": ["a"], "seed": 7, "depth": 3}
    assert copy.deepcopy(made).made_with == made.made_with


def test_what_is_remembered_is_plain() -> None:
    made = Base(np.float64(0.5), names={"x": (np.float64(1), object())}).made_with  # pyright: ignore
    assert type(made["rate"]) is float
    assert made["names"] == {"x": [1.0, "object"]}
    for name, method in METHODS.items():
        made = method.make().made_with
        assert json.loads(json.dumps(made)) == made, name
        assert {"sparsity", "axes", "restoration", "seed"} <= made.keys()


def test_wrong_arguments_are_left_to_the_class() -> None:
    with pytest.raises(TypeError, match=r"__init__\(\) got an unexpected keyword argument 'sed'"):
        Base(sed=1)  # pyright: ignore[reportCallIssue]


def test_differences() -> None:
    old = {"a": 1, "b": [1, 2], "gone": 0}
    assert differences(old, {"a": 1.0, "b": [1, 2], "new": 3}) == []
    assert differences(old, {"a": 2, "b": [2, 1]}) == ["a 1 (here 2)", "b [1, 2] (here [2, 1])"]


def test_a_checkpoint_made_otherwise_is_refused(tmp_path: Path) -> None:
    source, data = save_model(tmp_path / "dense"), make_data(tmp_path)

    def run(callback: Any, step: int | None = None) -> None:
        saver = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
        callbacks = [callback, LoRARecovery(rank=2), *([saver] if step is None else [])]
        trainer = make_trainer(tmp_path, callbacks, 3, enable_checkpointing=step is None)
        path = None if step is None else str(tmp_path / "saved" / f"step={step}.ckpt")
        module = PrunableLM(source, dtype="float32")
        trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)

    small: dict[str, Any] = {"samples": 8, "length": 16, "start": 2}
    run(FASPPruning(**small))
    run(FASPPruning(sparsity=0.2, **small), step=1)
    words = r"of FASP with these options, got one with sparsity 0.2 \(here 0.5\), seed 0 \(here 1\)"
    for step in (1, 2):  # before the cut and after
        with pytest.raises(UserError, match=words):
            run(FASPPruning(sparsity=0.5, seed=1, **small), step=step)
        with pytest.raises(UserError, match=r"expected a checkpoint of magnitude, got one of FASP"):
            run(MagnitudePruning(**small), step=step)


def test_numbers_of_other_kinds_and_paths_are_told_apart() -> None:
    class Made(RemembersOptions):
        def __init__(self, value: Any = None) -> None:
            self.value = value

    for value, plain in [
        (np.float64(0.25), 0.25),
        (np.float32(0.25), 0.25),
        (np.int64(3), 3),
        (torch.tensor(2), 2),
        (torch.tensor([0.5, 0.25]), [0.5, 0.25]),
        (np.array([1, 2]), [1, 2]),
        (Path("a") / "b", "a/b"),
        ({"y", "x"}, ["x", "y"]),
        (True, True),
    ]:
        found = Made(value).made_with["value"]
        assert (found, type(found)) == (plain, type(plain))
