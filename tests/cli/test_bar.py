"""The bar of a fit ends with training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import TQDMProgressBar

from lit_prune.cli.bar import FitBar, add_bar


@pytest.mark.parametrize(("epochs", "text"), [(-1, "Epoch 3"), (None, "Epoch 3"), (9, "Epoch 3/8")])
def test_epochs_are_counted_where_some_were_asked_for(epochs: int | None, text: str) -> None:
    bar = FitBar()
    bar._trainer = SimpleNamespace(max_epochs=epochs, loggers=[])  # pyright: ignore
    assert bar._get_train_description(3).strip() == text


def test_it_is_stopped_when_training_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    bar, stopped = FitBar(), []
    monkeypatch.setattr("lightning.pytorch.callbacks.RichProgressBar.on_train_end", print)
    bar.progress = SimpleNamespace(stop=lambda: stopped.append(True))  # pyright: ignore
    bar.on_train_end(None, None)  # pyright: ignore
    assert stopped == [True]


@pytest.mark.parametrize(
    "options",
    [{"enable_progress_bar": False}, {"callbacks": [TQDMProgressBar()]}, {"barebones": True}],
)
def test_another_or_none_is_left_alone(options: dict[str, Any]) -> None:
    config = {"callbacks": None, **options}
    add_bar(config, [])
    assert config == {"callbacks": None, **options}
    plain: dict[str, Any] = {"callbacks": []}
    add_bar(plain, [])
    assert [type(callback) for callback in plain["callbacks"]] == [FitBar]
