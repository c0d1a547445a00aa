"""A training loader whose order is a function of seed and epoch, and that resumes anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data.distributed import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class ShuffledSampler(DistributedSampler[int]):
    """Each epoch's order by seed, cut to whole batches on every rank.

    It is a `DistributedSampler` so that Lightning leaves it in place and doesn't shard again.

    Args:
        size: Items of the data set.
        batch_size: Items of a batch on one rank.
        seed: With the epoch, decides the order.
        rank: This process.
        world_size: Number of processes; they share each epoch's order.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, *, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(
            range(size),  # pyright: ignore[reportArgumentType]  only its length is used
            num_replicas=world_size,
            rank=rank,
            shuffle=True,
            seed=seed,
            drop_last=True,
        )
        self.size = size
        self.num_samples = size // (batch_size * world_size) * batch_size
        self.total_size = self.num_samples * world_size
        self.skip = 0

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch)[self.skip :])

    def order(self, epoch: int) -> list[int]:
        """Returns this rank's indices in an epoch."""
        generator = torch.Generator().manual_seed((self.seed << 24) + epoch)
        permutation = torch.randperm(self.size, generator=generator)
        return permutation[self.rank : self.total_size : self.num_replicas].tolist()

    def seek(self, epoch: int, skip: int) -> None:
        """Chooses what the next iterator yields: an epoch, without its first `skip` items."""
        self.epoch = epoch
        self.skip = skip

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: the loader counts its epochs.

        Lightning's count, which comes in here, is one too high after a resume from a checkpoint
        that was written at an epoch's end.
        """


class ResumableLoader(StatefulDataLoader):
    """A loader whose state is the epoch and the number of batches that it has given of it.

    torchdata's own state does not bring back the order of the epochs that follow, and resumed
    behind an epoch's last batch it gives Lightning an empty epoch. The state here is the same on
    every rank and for any number of workers. The sampler must be a `ShuffledSampler`.

    Attributes:
        progress: Asked for the first batch after a state was loaded: how many batches of its epoch
            the trainer has done, and of how many. None goes by the state alone.
    """

    progress: Callable[[], tuple[int, float]] | None = None
    _epoch = 0
    _given = 0
    _resumed = False

    def state_dict(self) -> dict[str, Any]:
        """Returns the epoch and how many batches of it were given."""
        return {"epoch": self._epoch, "batch": self._given}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues with the next batch after those that the state counts."""
        self._epoch = state_dict["epoch"]
        self._given = state_dict["batch"]
        self._resumed = True

    def __iter__(self) -> Any:
        # a generator: what is written here runs when the first batch is asked for, when a resuming
        # trainer knows where it stands; an iterator made only to look at starts no workers
        if self._resumed:
            self._resumed = False
            done, total = (self._given, len(self)) if self.progress is None else self.progress()
            if self.progress is not None and done >= total:
                return  # the trainer wants to see the epoch end that it had already reached
            if done == 0 or self._given >= len(self):
                self._next_epoch()
        elif self._given:
            self._next_epoch()
        if isinstance(self.sampler, ShuffledSampler):
            self.sampler.seek(self._epoch, self._given * (self.batch_size or 1))
        for batch in super().__iter__():
            self._given += 1
            yield batch

    def _next_epoch(self) -> None:
        if self._given:
            self._epoch += 1
            self._given = 0


def trainer_progress(trainer: Trainer) -> Callable[[], tuple[int, float]]:
    """Returns what `ResumableLoader.progress` asks, answered by a Lightning trainer."""
    return partial(_progress, trainer)


def _progress(trainer: Trainer) -> tuple[int, float]:
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready, trainer.num_training_batches
