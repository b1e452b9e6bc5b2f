"""Several Python threads, each with several of PyTorch's, give what one gives."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from volo_models import ARCH

from elsa_core import ELSASwin, ELSAVolo, elsa_attention


def operator_call(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator).requires_grad_()

    inputs = [draw(1, 33 + seed, 18, 64), draw(1, 33 + seed, 18, 98), draw(64, 7, 7)]
    out = elsa_attention(*inputs, kernel_size=7)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]


@pytest.mark.parametrize("torch_threads", [1, 3])
def test_operator_in_many_threads(torch_threads):
    before = torch.get_num_threads()
    expected = [operator_call(seed) for seed in range(4)]

    def work(index):
        torch.set_num_threads(torch_threads)
        return operator_call(index % 4)

    try:
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(work, range(16)))
    finally:
        torch.set_num_threads(before)
    for index, result in enumerate(results):
        torch.testing.assert_close(result, expected[index % 4], rtol=0, atol=0)


SWIN = {"embed_dim": 12, "depths": [1, 1], "num_heads": [1, 2], "group_width": 4}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (ELSASwin, {"arch": SWIN, "out_indices": (0, 1)}),
        (ELSAVolo, {"arch": ARCH, "img_size": 64, "pyramid": True}),
    ],
)
def test_one_model_in_many_threads(kind, options):
    torch.manual_seed(0)
    model = kind(**options).eval()
    images = [torch.randn(1, 3, 32 + 8 * index, 40) for index in range(4)]

    @torch.no_grad()
    def work(index):
        return model(images[index % 4])

    with ThreadPoolExecutor(4) as pool:  # first, so that threads also make what is kept
        results = list(pool.map(work, range(16)))
    expected = [work(index) for index in range(4)]
    for index, result in enumerate(results):
        torch.testing.assert_close(result, expected[index % 4])
