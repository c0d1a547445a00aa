"""Taylor scores as slow references: loops over samples, structures and entries of tiny Llamas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]
#: [samples][entries] of gradient times weight.
Structure = list[list[float]]


def make_batches(
    samples: int, length: int = 10, seed: int = 0, padded: bool = False
) -> list[Batch]:
    """Batches of one window each; if padded, each lacks a few tokens more at its end."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for number in range(samples):
        ids = torch.randint(3, 61, (1, length), generator=generator)
        mask = torch.ones_like(ids)
        if padded and number:
            mask[:, -number:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def loss_of(model: Any, batch: Batch) -> Tensor:
    """Mean next-token loss by hand."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    chosen = batch["labels"][:, 1:] != -100
    log = logits[:, :-1].log_softmax(-1)[chosen]
    return -log[torch.arange(len(log)), batch["labels"][:, 1:][chosen]].mean()


class Literal:
    """All products of gradients and weights of a Llama, sample by sample."""

    def __init__(self, model: Any, batches: list[Batch]) -> None:
        self.config = model.config
        self.losses: list[float] = []
        self.tokens = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
        self.products: list[dict[str, list[Any]]] = []
        for batch in batches:
            model.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            self.losses.append(float(loss.detach()))
            self.products.append(
                {n: (p.grad * p.detach()).tolist() for n, p in model.named_parameters()}
            )
        model.zero_grad(set_to_none=True)

    def row(self, name: str, row: int) -> Structure:
        """A row with its bias, in every sample."""
        found = []
        for products in self.products:
            bias = products.get(f"{name}.bias")
            found.append(products[f"{name}.weight"][row] + ([bias[row]] if bias else []))
        return found

    def column(self, name: str, column: int) -> Structure:
        """A column, in every sample."""
        return [[row[column] for row in products[f"{name}.weight"]] for products in self.products]

    def channel(self, layer: int, channel: int) -> list[list[Structure]]:
        """Structures of a channel: roles, each with one row."""
        mlp = f"model.layers.{layer}.mlp."
        return [
            [self.row(mlp + "gate_proj", channel)],
            [self.row(mlp + "up_proj", channel)],
            [self.column(mlp + "down_proj", channel)],
        ]

    def query(self, layer: int, head: int) -> list[list[Structure]]:
        """Structures of a query head: rows of Q, then columns of O."""
        attention, k = f"model.layers.{layer}.self_attn.", self.config.head_dim
        rows = range(head * k, (head + 1) * k)
        return [
            [self.row(attention + "q_proj", i) for i in rows],
            [self.column(attention + "o_proj", i) for i in rows],
        ]

    def shared(self, layer: int, group: int) -> list[list[Structure]]:
        """Structures of a KV head: rows of K, then rows of V."""
        attention, k = f"model.layers.{layer}.self_attn.", self.config.head_dim
        rows = range(group * k, (group + 1) * k)
        return [
            [self.row(attention + "k_proj", i) for i in rows],
            [self.row(attention + "v_proj", i) for i in rows],
        ]

    def score(
        self, structure: Structure, estimate: str, weighting: str = "uniform", fisher: str = "mean"
    ) -> float:
        """An estimate for one row or column, from the definitions."""
        samples = len(structure)
        shares = [1 / samples] * samples
        if weighting == "loss":
            shares = [loss / sum(self.losses) for loss in self.losses]
        scales = [1.0] * samples if fisher == "mean" else [float(n) for n in self.tokens]
        if estimate in ("vector", "coarse"):
            first = second = 0.0
            for share, scale, entries in zip(shares, scales, structure, strict=True):
                first += share * sum(entries)
                second += share * scale * sum(entries) ** 2
            return abs(first - second / 2) if estimate == "coarse" else abs(first)
        total = 0.0
        for place in range(len(structure[0])):
            first = second = 0.0
            for share, scale, entries in zip(shares, scales, structure, strict=True):
                first += share * entries[place]
                second += share * scale * entries[place] ** 2
            total += {
                "element1": abs(first),
                "element2": abs(second / 2),
                "mixed": abs(first - second / 2),
            }[estimate]
        return total

    def unit(self, roles: list[list[Structure]], *args: str) -> float:
        """The sum over structures."""
        return sum(self.score(structure, *args) for rows in roles for structure in rows)

    def scores(self, axis: str, layer: int, *args: str) -> list[Any]:
        """All units of a layer."""
        heads, groups = self.config.num_attention_heads, self.config.num_key_value_heads
        per = heads // groups
        if axis == "channel":
            count = self.config.intermediate_size
            return [self.unit(self.channel(layer, c), *args) for c in range(count)]
        queries = [self.unit(self.query(layer, h), *args) for h in range(heads)]
        nested = [queries[g * per : (g + 1) * per] for g in range(groups)]
        if axis == "query":
            return nested
        return [sum(nested[g]) + self.unit(self.shared(layer, g), *args) for g in range(groups)]
