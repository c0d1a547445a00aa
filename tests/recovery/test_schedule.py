"""Learning rates against their formulas, and the optimizers' updates."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lit_prune import PrunableLM
from lit_prune.errors import UserError
from lit_prune.recovery.schedule import check_settings, make_optimizer, warmed_up
from tests.structure.tiny import tiny_model
from tests.tiny_fit import Watch, make_data, make_tokenizer, make_trainer


def rates(steps: int, warmup: float, shape: Any) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule, found = warmed_up(optimizer, steps, warmup, shape), []
    for _ in range(steps + 2):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_the_rates_are_those_of_the_formulas():
    expected = {
        "cosine": [1 + math.cos(math.pi * k / 6) for k in range(6)],
        "linear": [2 - 2 * k / 6 for k in range(6)],
        "constant": [2.0] * 6,
    }
    for shape, fall in expected.items():
        end = [2.0] * 2 if shape == "constant" else [0.0] * 2
        assert rates(8, 0.25, shape) == pytest.approx([1.0, 2.0, *fall, *end], abs=1e-12), shape


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_the_first_rate_is_never_zero(shape: str):
    assert rates(1, 0.0, shape)[0] == 2.0
    assert rates(100, 0.0, shape)[0] == 2.0
    assert rates(3, 1.0, shape)[:3] == pytest.approx([2 / 3, 4 / 3, 2.0])


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("sgd", "cosine"), "expected optimizer to be one of adamw, adamw8bit, got 'sgd'"),
        (("adamw", "step"), "expected schedule to be one of cosine, linear, constant, got 'step'"),
    ],
)
def test_what_is_not_known_is_refused_by_its_name(names: tuple[str, str], text: str):
    with pytest.raises(UserError, match=text):
        check_settings(*names, lr=1e-3, weight_decay=0.0, warmup=0.0)


@pytest.mark.parametrize("size", [(8, 16), (64, 80)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_in_8_bit_is_nearly_adamw(size: tuple[int, int], dtype: torch.dtype):
    torch.manual_seed(0)
    start, target = torch.randn(size).to(dtype), torch.randn(size)
    ends, kinds = [], set()
    for name in ("adamw", "adamw8bit"):
        parameter = nn.Parameter(start.clone())
        optimizer = make_optimizer(name, [parameter], lr=1e-2, weight_decay=0.1)
        for _ in range(10):
            optimizer.zero_grad()
            (parameter.float() - target).square().mean().backward()
            optimizer.step()
        ends.append(parameter.detach().float() - start.float())
        state = optimizer.state[parameter]
        kinds |= {value.dtype for key, value in state.items() if key == "state1"}
    assert kinds == {torch.uint8 if math.prod(size) >= 4096 else torch.float32}
    assert ends[0].abs().mean() > 0.05
    close = 0.1 if dtype == torch.float32 else 0.2
    assert (ends[1] - ends[0]).norm() < close * ends[0].norm()


def test_steps_without_a_limit_are_refused(tmp_path: Path):
    module = PrunableLM.from_model(tiny_model("llama"), make_tokenizer())
    trainer = make_trainer(tmp_path, max_steps=-1, max_epochs=-1, max_time={"seconds": 1})
    with pytest.raises(UserError, match="max_epochs, got neither"):
        trainer.fit(module, datamodule=make_data(tmp_path))


def test_a_callback_can_bring_its_own_optimization(tmp_path: Path):
    module = PrunableLM.from_model(tiny_model("llama"), make_tokenizer())
    gates = module.gates = nn.Linear(2, 2)

    def own(of: Any) -> Any:
        assert of is module
        return torch.optim.SGD(gates.parameters(), lr=0.1)

    module.optimization_of = own
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, datamodule=make_data(tmp_path))
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is torch.optim.SGD
    assert {"gates.weight", "gates.bias"} <= {name for name, _ in module.named_parameters()}


@pytest.mark.parametrize(
    ("options", "kind"), [({}, "AdamW"), ({"optimizer": "adamw8bit"}, "AdamW8bit")]
)
def test_the_module_trains_with_what_was_asked_for(tmp_path: Path, options: Any, kind: str):
    settings = {"learning_rate": 2.0, "weight_decay": 0.1, "warmup": 0.25, "schedule": "linear"}
    model = tiny_model("llama")
    module = PrunableLM.from_model(model, make_tokenizer(), **settings, **options)
    watch = Watch()
    trainer = make_trainer(tmp_path, [watch], max_steps=8)
    trainer.fit(module, datamodule=make_data(tmp_path))
    assert type(trainer.optimizers[0]).__name__ == kind
    assert trainer.optimizers[0].param_groups[0]["weight_decay"] == 0.1
    assert watch.rates == pytest.approx([1.0, 2.0, *[2 - 2 * k / 6 for k in range(6)]])
