"""A small model, task data, and what is found with both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.small_tasks import make_tokenizer, write_all
from tests.structure.tiny import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", max_position_embeddings=256).double()


@pytest.fixture(scope="module")
def found(model: Any, folder: Path) -> dict[str, Any]:
    from lit_prune.evaluation.tasks import evaluate_tasks

    pytest.importorskip("lm_eval")
    return evaluate_tasks(model, make_tokenizer(), "papers", data=folder, progress=False)
