"""The training order: shuffled anew each epoch, shared by ranks, resumed at the exact batch."""

import copy
import itertools

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader, Dataset

from lit_prune.data.loader import ResumableLoader, ShuffledSampler, trainer_progress

pytestmark = pytest.mark.filterwarnings("ignore:.*set_vital")

SIZE, BATCH = 14, 3
WHOLE = SIZE // BATCH


class Numbers(Dataset[int]):
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return index


def make_loader(workers=0, seed=0, size=SIZE, **options):
    sampler = ShuffledSampler(size, BATCH, seed, **options)
    return ResumableLoader(
        Numbers(size), batch_size=BATCH, sampler=sampler, drop_last=True, num_workers=workers
    )


def epochs(loader, count):
    return [[batch.tolist() for batch in loader] for _ in range(count)]


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def test_every_epoch_has_another_order_of_different_items():
    seen = epochs(make_loader(), 3)
    assert [len(epoch) for epoch in seen] == [WHOLE] * 3
    for epoch in seen:
        items = flat(epoch)
        assert len(set(items)) == len(items) == WHOLE * BATCH
    assert seen[0] != seen[1] != seen[2] != seen[0]
    assert seen == epochs(make_loader(), 3)
    assert seen != epochs(make_loader(seed=1), 3)


@pytest.mark.parametrize("given", range(3 * WHOLE))
def test_resumes_at_the_next_batch_of_any_epoch(given):
    expected = flat(epochs(make_loader(), 4))
    loader, seen = make_loader(), []
    while len(seen) < given:
        for batch in loader:
            seen.append(batch.tolist())
            if len(seen) == given:
                break
    state = copy.deepcopy(loader.state_dict())
    resumed = make_loader()
    resumed.load_state_dict(state)
    rest = flat(epochs(resumed, 2))
    assert seen == expected[:given]
    assert rest == expected[given : given + len(rest)]
    assert len(rest) > WHOLE


def test_an_epoch_left_early_is_over():
    whole = epochs(make_loader(), 3)
    loader = make_loader()
    cut = []
    for _ in range(3):
        cut.append(next(iter(loader)).tolist())
    assert cut == [epoch[0] for epoch in whole]


def test_an_iterator_that_is_not_used_changes_nothing():
    loader = make_loader()
    iter(loader)
    assert loader.state_dict() == {"epoch": 0, "batch": 0}
    assert epochs(loader, 2) == epochs(make_loader(), 2)


def test_workers_give_the_same_batches_and_states():
    plain, loader = make_loader(), make_loader(workers=1)
    states = [loader.state_dict() for _ in loader]
    assert states == [{"epoch": 0, "batch": i} for i in range(1, WHOLE + 1)]
    resumed = make_loader(workers=1)
    resumed.load_state_dict(states[1])
    assert epochs(resumed, 2) == [epochs(plain, 1)[0][2:], epochs(plain, 1)[0]]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_batches_of_one_process(world):
    size = BATCH * world * 7 - 1  # what is left over would be one more batch on the first rank
    ranks = [
        epochs(make_loader(size=size, rank=rank, world_size=world), 2) for rank in range(world)
    ]
    sampler = ShuffledSampler(size, BATCH * world, 0)
    for epoch in range(2):
        assert [len(ranks[rank][epoch]) for rank in range(world)] == [6] * world
        order = sampler.order(epoch)
        for number in range(6):
            together = sorted(flat(ranks[rank][epoch][number] for rank in range(world)))
            assert together == sorted(order[number * BATCH * world :][: BATCH * world])


class _Data(LightningDataModule):
    def train_dataloader(self):
        loader = make_loader()
        assert self.trainer is not None
        loader.progress = trainer_progress(self.trainer)
        return loader

    def val_dataloader(self):
        return DataLoader(Numbers(2))


class _Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, index):
        self.seen.append((self.current_epoch, index, batch.tolist()))
        return self.layer(batch.float()[:, None]).sum()

    def validation_step(self, batch, index):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-4)


class _Save(Callback):
    def __init__(self, folder):
        self.folder = folder

    def save(self, trainer, when):
        trainer.save_checkpoint(self.folder / f"{when}-{trainer.global_step}.ckpt")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.save(trainer, "batch")

    def on_train_epoch_end(self, trainer, pl_module):
        self.save(trainer, "epoch")

    def on_validation_end(self, trainer, pl_module):
        self.save(trainer, "validation")


def fit(checkpoint=None, callbacks=(), **options):
    model = _Model()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=10,
        max_epochs=-1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(model, datamodule=_Data(), ckpt_path=checkpoint, weights_only=True)
    return model.seen


@pytest.mark.parametrize(
    "options",
    [{"limit_val_batches": 0}, {"limit_val_batches": 0, "limit_train_batches": 2}, {}],
    ids=["train", "short epochs", "validate"],
)
def test_lightning_resumes_as_if_it_had_not_stopped(tmp_path, options):
    whole = fit(callbacks=[_Save(tmp_path)], **options)
    length = options.get("limit_train_batches", WHOLE)
    assert [seen[:2] for seen in whole] == [divmod(i, length) for i in range(10)]
    # around the ends of epochs, where the kinds of checkpoints differ
    steps = {1, length - 1, length, length + 1, 2 * length}
    for path in tmp_path.iterdir():
        step = int(path.stem.split("-")[1])
        if step in steps:
            assert fit(str(path), **options) == whole[step:], path.name
