"""Random numbers that follow from a place in the training, with any number of workers."""

import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

from elsa_core.runtime.randomness import Placed, PlacedData, PlacedSampler, seed_all

SIZE, BATCH = 7, 2


class Draws(Dataset):
    """Of each image: its index, and a number of each generator that augmentations use."""

    metainfo = {"classes": ("a",)}

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        assert type(index) is int
        return index, random.random(), float(np.random.rand()), float(torch.rand(()))


def batches(loader, number):
    found, iterator = [], iter(loader)
    for _ in range(number):
        found.append([part.tolist() for part in next(iterator)])
        random.random(), np.random.rand(), torch.rand(3)  # what a model draws between them
    return found


def test_seeds_differ_by_place_and_return():
    drawn = []
    for place in ("0/0/1", "0/0/2", "0/1/0", "0/0/1"):
        seed_all(place)
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert drawn[0] == drawn[3] and len(set(drawn)) == 3


def test_wrappers_have_the_attributes_of_what_they_wrap():
    data = Draws()
    for wrapped in (PlacedData(data), pickle.loads(pickle.dumps(PlacedData(data)))):
        assert wrapped.metainfo == data.metainfo and len(wrapped) == SIZE
        assert not hasattr(wrapped, "pipeline") and not hasattr(wrapped, "__getitems__")
    PlacedData(data).pipeline = "new"
    assert data.pipeline == "new"
    sampler = SimpleNamespace(seed=3)
    assert not hasattr(PlacedSampler(sampler, "0"), "skip")
    PlacedSampler(sampler, "0").seed = 4
    assert sampler.seed == 4
    again = pickle.loads(pickle.dumps(Placed(3, "0/1")))
    assert again == 3 and again.place == "0/1"


class Groups(BatchSampler):
    """Another class than PyTorch's, as those that group images by shape."""


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [BatchSampler, Groups])
def test_a_resumed_training_of_openmmlab_draws_the_same(kind, workers):
    pytest.importorskip("mmengine")
    from mmengine.dataset import InfiniteSampler

    from elsa_mm.resume_order import continue_order

    def training(done, workers):
        torch.manual_seed(done)  # whatever came before
        data = Draws()
        sampler = kind(InfiniteSampler(data, seed=5), BATCH, False)
        loop = SimpleNamespace(
            dataloader=DataLoader(data, num_workers=workers, batch_sampler=sampler), iter=0, epoch=0
        )
        continue_order(SimpleNamespace(train_loop=loop, seed=5, cfg={}))
        skip = getattr(loop.dataloader.batch_sampler.sampler, "skip", None)
        if done and skip is None:  # older MMEngines go through the data
            return batches(loop.dataloader, done + 2)[done:]
        if done:
            skip(done * BATCH)
        return batches(loop.dataloader, 2 if done else 5)

    whole = training(0, 0)
    assert len({number for batch in whole for number in batch[1]}) == 5 * BATCH
    assert training(0, workers) == whole
    assert training(3, workers) == whole[3:]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_training_of_detectron2_draws_the_same(workers):
    pytest.importorskip("detectron2")
    from detectron2.data import build_detection_train_loader
    from detectron2.data.samplers import TrainingSampler

    from elsa_d2.data.sampler import continue_order, torch_loader

    def mapper(index):
        return Draws()[index]

    def training(done, workers):
        torch.manual_seed(done)
        loader = build_detection_train_loader(
            list(range(SIZE)),
            mapper=mapper,
            sampler=TrainingSampler(SIZE, seed=5),
            total_batch_size=BATCH,
            aspect_ratio_grouping=False,
            num_workers=workers,
            collate_fn=lambda rows: list(map(torch.tensor, zip(*rows, strict=True))),
        )
        hook = continue_order(torch_loader(loader), BATCH)
        model = torch.nn.Identity()
        hook.trainer = SimpleNamespace(start_iter=done, iter=done, model=model)
        hook.before_train()
        found, iterator = [], iter(loader)
        for hook.trainer.iter in range(done, 5):
            hook.before_step()
            found.append([part.tolist() for part in next(iterator)])
            found[-1].append(model(torch.rand)(3).tolist())  # what the model draws
        return found

    whole = training(0, 0)
    assert training(0, workers) == whole
    assert training(3, workers) == whole[3:]
