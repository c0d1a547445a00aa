from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer

from lit_prune.errors import UserError
from lit_prune.fitting.ranks import ranks_of


def strategy(name: str, devices: int = 2) -> object:
    return Trainer(
        accelerator="cpu", devices=devices, strategy=name, logger=False, enable_checkpointing=False
    ).strategy


@pytest.mark.parametrize("name", ["ddp_spawn", "ddp_fork"])
def test_strategies_that_leave_the_main_process_unpruned_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"got {name}, .* use --trainer.strategy ddp$") as caught:
        ranks_of(strategy(name))
    assert "\n" not in str(caught.value)


def test_others_are_served() -> None:
    ranks_of(strategy("ddp"))


def test_one_process_agrees_with_itself() -> None:
    ranks, tensor = ranks_of(strategy("auto", devices=1)), torch.tensor([1.0, 2.0])
    assert torch.equal(ranks.reduce(tensor), tensor)
    decision = {"channel": torch.tensor([0, 2])}
    assert ranks.agree(decision) is decision
