"""SyncBatchNorm: processes with parts of a batch against one with all of it.

Starting processes takes seconds, so a test starts them once and looks at all they have done.
"""

import copy

import pytest
import ranks
import sync_cases
import sync_modules
import torch
from cases import assert_close, compute_dtype
from torch import nn

import fastnorm

BACKENDS = ranks.backends()


def close(got, want, name=""):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10, msg=lambda m: f"{name}: {m}")


def test_two_processes(tmp_path):
    work = [
        sync_cases.results_of_cases, sync_cases.results_of_linear,
        sync_modules.in_evaluation, sync_modules.second_derivatives, sync_modules.linear_twice,
    ]  # fmt: skip
    results = ranks.run(2, work, tmp_path)
    check_cases(results)
    check_linear(results)
    check_linear_twice(results)
    check_second_derivatives(results)
    for rank in results:
        assert rank["in_evaluation"] == {"same": True, "collectives": []}


@pytest.mark.slow
def test_four_processes(tmp_path):
    work = [
        sync_cases.results_of_cases, sync_cases.results_of_linear, sync_modules.under_ddp,
        sync_modules.in_subgroups, sync_modules.second_derivatives,
    ]  # fmt: skip
    results = ranks.run(4, work, tmp_path)
    check_cases(results)
    check_linear(results)
    check_training(results, "under_ddp")
    check_second_derivatives(results)
    for backend in BACKENDS:
        for rank, found in enumerate(results):
            x = torch.cat(sync_modules.pair_of_rank(rank))
            want = nn.BatchNorm1d(3, dtype=torch.float64)(x).split([3, 4])[rank % 2]
            close(found["in_subgroups"][backend], want, f"rank {rank} on {backend}")


def check_cases(results):
    """Outputs, gradients and buffers against float64, and how many collectives they took."""
    for name, case in sync_cases.shared_cases(len(results)).items():
        want = sync_cases.expected(case)
        for backend in BACKENDS:
            found = [rank["results_of_cases"][backend, name] for rank in results]
            check_case(case, found, want, f"{name} on {backend}")


def check_case(case, found, want, where):
    terms = want["y"].numel() // want["y"].shape[1]
    roundings = 1 + (case.residual and case.activation != "identity")
    for key in ("y", *sync_cases.names_of_gradients(found[0])):
        got = sync_cases.whole(found, key)
        assert got.dtype == found[0][key].dtype
        compute = compute_dtype(case.dtype)
        assert_close(got, want[key], terms, f"{key}, {where}", roundings, compute)
    for key in ("running_mean", "running_var") if case.tracked else ():
        size = max(abs(case.mean), 1.0)
        assert_close(found[0][key], want[key], terms, f"{key}, {where}", intermediate=size)
        for other in found[1:]:
            assert torch.equal(found[0][key], other[key]), f"not the same bits: {key}, {where}"
    for part in found:
        assert part["count"].item() == 5
        backward = ["all_reduce"] if "dx" in part else []
        assert part["collectives"] == ["all_gather", *backward], where


def check_linear(results):
    for name in sync_cases.linear_parts(len(results)):
        want = sync_cases.expected_linear(name)
        for backend in BACKENDS:
            for way in sync_cases.linear_ways(backend):
                where = f"{name}, {way} on {backend}"
                found = [rank["results_of_linear"][backend, way, name] for rank in results]
                check_linear_case(name, found, want, where)
                assert ("Gram" in found[1]["by"]) == (way in ("gram", "joined")), where
                joined = [part["joined"] for part in found if part["y"].numel()]
                assert set(joined) == {way == "joined"}, where
                for part in found:
                    assert part["collectives"] == ["all_gather", "all_reduce"], where


def check_linear_case(name, found, want, where):
    far = 50.0 if name == "far from 0" else 1.0  # the size of Z, whose mean is subtracted
    for key, tensor in want.items():
        got = found[0][key]
        if not key.startswith("running"):
            got = sync_cases.whole(found, key)
        elif any(not torch.equal(got, other[key]) for other in found[1:]):
            pytest.fail(f"not the same bits: {key}, {where}")
        if name == "bfloat16":  # rounded are the parts of a sum, and where they are stored Z and dZ
            error = (got.double() - tensor).abs().max() / tensor.abs().max().clamp_min(1e-9)
            assert error < 3 * 2**-8, f"{key}, {where}"
        else:
            size = 4 * far * max(tensor.abs().max().item(), 1.0)
            terms = 4 * want["y"].shape[0]
            assert_close(got, tensor, terms, f"{key}, {where}", intermediate=size)
    assert found[0]["dbias"].count_nonzero() == 0


def check_training(results, name):
    """Outputs, parameters and buffers of training by processes are those of one."""
    one = sync_modules.model()
    with fastnorm.use_backend("eager"):
        want = sync_modules.trained(one, sync_modules.parts_of(len(results)))
    for backend in BACKENDS:
        found = [rank[name][backend] for rank in results]
        for step, output in enumerate(want):
            got = torch.cat([part["outputs"][step] for part in found])
            close(got, output, f"output {step} on {backend}")
        for key, tensor in one.state_dict().items():
            close(found[0]["state"][key], tensor, f"{key} on {backend}")
            for other in found[1:]:
                assert torch.equal(other["state"][key], found[0]["state"][key]), key


def check_second_derivatives(results):
    x, residual, dy, v, weight, bias = sync_modules.derivatives_input()
    leaves = {"x": x, "residual": residual, "weight": weight, "bias": bias, "dy": dy}
    for activation in sync_modules.ACTIVATIONS:
        given = (t.clone().requires_grad_() for t in leaves.values())
        want = sync_modules.twice(*given, v, activation, None)
        for backend in BACKENDS:
            found = [rank["second_derivatives"][backend, activation] for rank in results]
            for i, (name, leaf) in enumerate(leaves.items()):
                parts = [part[i] for part in found]  # None where nothing depends on it
                if name in ("weight", "bias"):
                    got = sum((part for part in parts if part is not None), torch.zeros_like(leaf))
                else:
                    got = torch.zeros_like(leaf) if parts[0] is None else torch.cat(parts)
                wanted = torch.zeros_like(leaf) if want[i] is None else want[i]
                close(got, wanted, f"{name}, {activation} on {backend}")


def check_linear_twice(results):
    """First and second derivatives of all algorithms, of which one has an empty part."""
    *leaves, v = sync_modules.linear_leaves(0, 1)
    want = sync_modules.of_linear(*leaves, v, "unfused", None)
    own = (0, 5, 9)  # dx, and derivatives by x and dy; those by parameters are sums
    for (backend, algorithm), found in results[0]["linear_twice"].items():
        others = [rank["linear_twice"][backend, algorithm] for rank in results[1:]]
        for i, tensor in enumerate(want):
            parts = [found[i], *(other[i] for other in others)]
            got = torch.cat(parts) if i in own else sum(parts)
            close(got, tensor, f"{i}, {algorithm} on {backend}")


def check_pointwise(results):
    x, weight, gamma, beta, dy = sync_modules.pointwise_tensors()
    leaves = [t.requires_grad_() for t in (x, weight, gamma, beta)]
    z = nn.functional.conv2d(x, weight[:, :, None, None])
    y = torch.tanh(nn.functional.batch_norm(z, None, None, gamma, beta, training=True))
    want = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    for key in results[0]["pointwise"]:
        parts = [rank["pointwise"][key] for rank in results]
        for i, tensor in enumerate(want):
            found = [part[i] for part in parts]
            close(torch.cat(found) if i < 2 else sum(found), tensor, f"{i} of {key}")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own use of it
def test_ddp_fsdp_and_transforms(tmp_path):
    work = [
        sync_modules.under_ddp, sync_modules.under_fsdp, sync_modules.in_transforms,
        sync_modules.linear_alone, sync_modules.pointwise,
    ]  # fmt: skip
    results = ranks.run(2, work, tmp_path)
    check_training(results, "under_ddp")
    check_training(results, "under_fsdp")
    for rank in results:
        assert all(rank["linear_alone"].values()), rank["linear_alone"]
    check_pointwise(results)
    *large, weight, bias = sync_modules.derivatives_input()
    x, _, dy, v = large

    def call(x):
        y = nn.functional.batch_norm(x, None, None, weight, bias, training=True)
        return nn.functional.silu(y)

    y, pull = torch.func.vjp(call, x)
    want = {"y": y, "vjp": pull(dy)[0], "jvp": torch.func.jvp(call, (x,), (v,))[1]}
    for name, tensor in want.items():
        close(torch.cat([rank["in_transforms"][name] for rank in results]), tensor, name)


@pytest.mark.slow
@pytest.mark.parametrize("work", [sync_modules.compiled, sync_modules.compiled_by_inductor])
def test_compiled(tmp_path, work):
    found = [rank[work.__name__] for rank in ranks.run(2, [work], tmp_path)]
    x, _, dy, *_ = sync_modules.derivatives_input()
    x = x.clone().requires_grad_()
    norm = nn.BatchNorm1d(3, dtype=torch.float64)
    y = nn.functional.relu(norm(x))
    y.backward(dy)
    close(torch.cat([part["y"] for part in found]), y.detach())
    close(torch.cat([part["dx"] for part in found]), x.grad)
    for part in found:
        close(part["mean"], norm.running_mean)
        close(part["var"], norm.running_var)


@pytest.mark.slow
def test_failures_are_errors(tmp_path):
    """A process that does not come, or dies, makes the others fail in time."""
    with pytest.raises(FileNotFoundError):  # of the process that died
        ranks.run(2, [sync_modules.meets_failures], tmp_path)
    found = torch.load(tmp_path / "0.pt")["meets_failures"]
    assert found.keys() == {"absent", "dead"}
    for name, (message, seconds) in found.items():
        assert message, f"no error where the other process is {name}"
        assert seconds < 20, name


def test_conversion_keeps_everything():
    plain = nn.Sequential(
        fastnorm.LinearBatchNorm(3, 4, activation="silu"),
        fastnorm.BatchNorm1d(4, eps=1e-3, momentum=None, activation="gelu").half(),
        nn.BatchNorm1d(4, affine=False, track_running_stats=False).eval(),
        nn.InstanceNorm1d(4),
        nn.Sequential(nn.BatchNorm2d(4, device="meta")),
    )
    group = object()
    before = copy.deepcopy(plain)
    tensors = dict(plain.named_parameters()) | dict(plain.named_buffers())
    synced = fastnorm.SyncBatchNorm.convert_sync_batchnorm(plain, group)
    assert synced is plain
    norms = [synced[0].norm, synced[1], synced[2], synced[4][0]]
    for norm in norms:
        assert type(norm) is fastnorm.SyncBatchNorm
        assert norm.process_group is group
    assert type(synced[3]) is nn.InstanceNorm1d
    found = dict(synced.named_parameters()) | dict(synced.named_buffers())
    assert found.keys() == tensors.keys()
    assert all(found[name] is tensors[name] for name in tensors)
    assert [norm.activation for norm in norms] == ["silu", "gelu", "identity", "identity"]
    assert [module.training for module in synced.modules()] == [
        module.training for module in before.modules()
    ]
    assert synced[1].eps == 1e-3
    assert synced[1].momentum is None
    alone = fastnorm.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm1d(4))
    assert type(alone) is fastnorm.SyncBatchNorm
    again = fastnorm.SyncBatchNorm.convert_sync_batchnorm(synced[1])
    assert again.activation == "gelu"


def test_without_processes_it_is_batch_norm(backend):
    x = torch.randn(4, 3, 5, device=backend)
    torch.manual_seed(0)
    ours = fastnorm.SyncBatchNorm(3, activation="relu").to(backend)
    plain = fastnorm.BatchNorm1d(3, activation="relu").to(backend)
    for _ in range(2):
        assert torch.equal(ours(x, residual=x), plain(x, residual=x))
        assert all(map(torch.equal, ours.state_dict().values(), plain.state_dict().values()))
        ours.eval()
        plain.eval()


def test_errors():
    norm = fastnorm.SyncBatchNorm(3)
    with pytest.raises(ValueError, match="at least 2D input \\(got 1D input\\)"):
        norm(torch.ones(3))
    with pytest.raises(ValueError, match="number of input channels should be non-zero"):
        norm(torch.ones(3, 0))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(torch.ones(1, 3))
    with pytest.raises(ValueError, match="activation must be one of"):
        fastnorm.SyncBatchNorm(3, activation="swish")
    assert "activation='relu'" in repr(fastnorm.SyncBatchNorm(3, activation="relu"))
