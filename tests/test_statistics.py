"""The mean and the standard deviation that the kernels save, wherever outliers lie."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fastnorm.kernels import batch_norm, group_norm, layer_norm, sync_batch_norm
from fastnorm.kernels import linear_batch_norm_epilogue as epilogue
from fastnorm.kernels.launch import ChannelView, cdiv

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-5
PLACES = ("first", "middle", "last", "everywhere")


def sets(count: int, size: int, place: str, value: float = 1e4) -> Tensor:
    """(count, size) normal values, and one outlier in each set; everywhere: a large mean."""
    x = torch.randn(count, size, generator=torch.Generator().manual_seed(0))
    if place == "everywhere":
        x += value
    else:
        x[:, {"first": 0, "middle": size // 2, "last": -1}[place]] = value
    return x.to(DEVICE)


def laid_out(x: Tensor, columns: bool) -> Tensor:
    """(N, C, S), with channels innermost or not."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if columns else x.contiguous()


def assert_statistics(stats: Sequence[Tensor], x: Tensor) -> None:
    """(mean, rest, rstd) of each row of x: off by a rounding of x̂ at its largest, or a few."""
    mean, rest, rstd = (t.double() for t in stats)
    x = x.double()
    std = x.std(1, correction=0)
    want = 1 / torch.sqrt(std**2 + EPS)
    step = torch.finfo(torch.float32).eps
    assert ((mean + rest - x.mean(1)).abs() / std).max() < step
    assert ((rstd - want) / want).abs().max() < 6 * step


def normalize_channels(x: Tensor, view: ChannelView, **found: tuple[Tensor, Tensor]) -> Tensor:
    _, stats = batch_norm.forward(
        x, None, None, None, None, None, None, True, 0.1, EPS, "identity", view, **found
    )
    return stats


@pytest.mark.parametrize(
    ("view", "whole"),
    [
        (ChannelView(250, 24, 1, True), True),
        (ChannelView(3001, 9, 1, True), False),
        (ChannelView(8, 3, 37, False), True),
        (ChannelView(9, 3, 1800, False), False),
        (ChannelView(40, 16, 49, False), True),
        (ChannelView(3000, 6, 6, False), False),
    ],
    ids=str,
)
@pytest.mark.parametrize("place", PLACES)
def test_channels(view, whole, place):
    N, C, S, columns = view
    x = sets(C, N * S, place)
    tensor = laid_out(x.view(C, N, S).movedim(0, 1), columns)
    assert batch_norm.launch_of(tensor, view).plan.whole == whole or DEVICE.type == "cuda"
    assert_statistics(normalize_channels(tensor, view), x)


@pytest.mark.parametrize(
    ("view", "groups"),
    [
        (ChannelView(4, 256, 1, False), 1),  # a group's channels have one value each
        (ChannelView(4, 600, 1, True), 2),
        (ChannelView(2, 64, 2, False), 1),
        (ChannelView(3, 6, 37, True), 6),
        (ChannelView(2, 512, 40, True), 2),
        (ChannelView(2, 512, 40, False), 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("place", PLACES)
def test_groups(view, groups, place):
    N, C, S, columns = view
    x = sets(N * groups, C // groups * S, place)
    _, stats = group_norm.forward(
        laid_out(x.view(N, C, S), columns), None, None, None, None, None, 0.1, EPS, "identity",
        view, groups,
    )  # fmt: skip
    assert_statistics(stats, x)


@pytest.mark.parametrize("shape", [(3, 1000), (3, 40000), (1, 70001)], ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_rows(shape, place):
    """In registers, in a loop, and shared by programs."""
    x = sets(*shape, place)
    N = shape[1]
    _, _, stats = layer_norm.forward(x, None, None, None, EPS, "identity", True, N, shape)
    assert_statistics((stats[1], stats[2], stats[0]), x)


@pytest.mark.parametrize("parts", [(100, 150), (0, 2, 300), (1,) * 40], ids=len)
@pytest.mark.parametrize("place", PLACES)
def test_processes(parts, place):
    """A process of few samples may be nothing but the outlier."""
    x = sets(16, sum(parts), place)
    own = [
        sync_batch_norm._moments(
            laid_out(part.T[..., None], columns=True),
            ChannelView(part.shape[1], 16, 1, True), None, torch.float32,
        )
        for part in x.split(parts, 1)
    ]  # fmt: skip
    stats, _ = sync_batch_norm.finalize(torch.stack(own), None, None, 0.1, EPS)
    assert_statistics(stats, x)


@pytest.mark.parametrize("place", PLACES)
def test_columns_of_a_product(place):
    M, N = 3000, 16
    z = sets(N, M, place)
    view = ChannelView(1, N, M, True)
    eye = torch.eye(N, device=DEVICE)
    product, found = epilogue.product(z.T.contiguous().T[None], eye, None, view, True)
    assert found is not None
    assert found[1].numel() >= cdiv(M, 128)
    assert_statistics(normalize_channels(product, view, found=found), z)
