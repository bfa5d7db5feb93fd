"""Huge pages: advice that changes no value, and is only given for memory of one's own."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kfac_tn.tn import pages
from kfac_tn.tn.pages import HUGE, LEAST, on_huge_pages


@pytest.fixture
def advice(monkeypatch):
    """Ranges that were advised."""
    given = []
    monkeypatch.setattr(pages, "_madvise", lambda start, size, _: given.append((start, size)))
    return given


@pytest.mark.parametrize("elements", [LEAST // 4, LEAST // 4 + 1, 5 * HUGE // 4 + 77, 2**23])
def test_whole_pages_inside_the_tensor(elements, advice):
    tensor = on_huge_pages(torch.empty(elements))
    (start, size) = advice.pop()
    assert start % HUGE == size % HUGE == 0 < size
    assert tensor.data_ptr() <= start
    assert start + size <= tensor.data_ptr() + tensor.nbytes
    assert tensor.nbytes - size < 2 * HUGE


def test_small_fake_and_transformed_tensors(advice):
    on_huge_pages(torch.empty(1000))
    on_huge_pages(torch.empty(0))
    on_huge_pages(torch.empty(2**24, device="meta"))
    with FakeTensorMode():
        on_huge_pages(torch.empty(2**24))
    torch.func.vmap(lambda x: on_huge_pages(x.new_empty(2**20)) * 0 + x)(torch.ones(8))
    assert not advice


def test_values():
    tensor = on_huge_pages(torch.empty(2**22))
    assert torch.equal(tensor.copy_(torch.arange(2**22)), torch.arange(2.0**22))
