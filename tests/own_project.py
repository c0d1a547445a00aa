"""A project as somebody else has it: module, model wrapper, data and optimizer are its own.

Of this package it uses `Prunable` and the callbacks, as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import AutoModelForCausalLM

from lit_prune import Prunable


class Tempered(nn.Module):
    """A language model whose logits are divided by a temperature that is learnt.

    Args:
        lm: The language model.
    """

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, batch: Mapping[str, Tensor]) -> Any:
        """The language model's output, with other logits [batch, tokens, vocabulary]."""
        output = self.lm(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        )
        output.logits = output.logits / self.temperature
        return output


class OwnModule(Prunable, LightningModule):
    """Trains a `Tempered` with label smoothing, by SGD with momentum.

    Args:
        source: Folder of the language model.
    """

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source

    def configure_model(self) -> None:
        """Load the model, once, and offer it to callbacks."""
        if self.model is None:
            self.net = Tempered(AutoModelForCausalLM.from_pretrained(self.source))
            self.adopt(self.net.lm)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The module's loss, or that of a callback."""
        output = self.net(batch)
        loss = self.loss(batch, output, smoothed(output.logits, batch["labels"]))
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """SGD over what takes gradients now, and a rate that falls with each step."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    """Next-token cross-entropy with a tenth of the weight on all tokens alike, [].

    Args:
        logits: [batch, tokens, vocabulary].
        labels: [batch, tokens].
    """
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1
    )


class OwnData(LightningDataModule):
    """Numbers that follow one another, with steps of one to three.

    Args:
        vocabulary: How many numbers there are.
    """

    def __init__(self, vocabulary: int = 61) -> None:
        super().__init__()
        self.vocabulary = vocabulary

    def train_dataloader(self) -> StatefulDataLoader[Any]:
        """Batches of 2 rows of 10 tokens; resumes at the next one."""
        rows: Any = self._rows(64, 10, seed=0)
        return StatefulDataLoader(rows, batch_size=2)

    def val_dataloader(self) -> StatefulDataLoader[Any]:
        """One batch of 4 rows of 10 tokens."""
        rows: Any = self._rows(4, 10, seed=2)
        return StatefulDataLoader(rows, batch_size=4)

    def protocol(self) -> dict[str, Any]:
        """What the report says of the validation text."""
        return {"text": "numbers", "split": "all", "window": 10, "tokens": 40, "train": "numbers"}

    def calibration_batches(self, samples: int, length: int, batch_size: int) -> list[Any]:
        """What the pruning callbacks ask for."""
        rows = self._rows(samples, length, seed=1)
        batches = [rows[start : start + batch_size] for start in range(0, samples, batch_size)]
        return [torch.utils.data.default_collate(batch) for batch in batches]

    def _rows(self, number: int, length: int, seed: int) -> list[dict[str, Tensor]]:
        draw = torch.Generator().manual_seed(seed)
        steps = torch.randint(1, 4, (number, length), generator=draw)
        ids = steps.cumsum(1) % self.vocabulary
        return [
            {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids
        ]
