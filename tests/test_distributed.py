"""Claims about `athena.Guidance` in two processes: the gradients are those of one process on the whole batch."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import athena

PROCESSES = 2


def network() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten()),
        nn.Sequential(nn.Linear(64, 8), nn.GELU()),
        nn.Linear(8, 4),
    ).double()


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(6)
    return torch.randn(6, 2, 6, 6).double(), torch.tensor([0, 3, 1, 2, 2, 0])


def whole() -> dict[str, Tensor]:
    """In one process."""
    model, (x, y) = network(), batch()
    with athena.Guidance(model, 2.0, scope="all"):
        F.cross_entropy(model(x), y).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def fsdp(model: nn.Module, layers: bool = False) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    settings: dict[str, Any] = {"device_id": torch.device("cpu"), "use_orig_params": True}
    if layers:
        for name in ("0", "1"):
            setattr(model, name, FullyShardedDataParallel(model.get_submodule(name), **settings))
    return FullyShardedDataParallel(model, **settings)


def fsdp2(model: nn.Module, layers: bool = False) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (PROCESSES,))
    for block in [*model.children()][:2] if layers else []:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": DistributedDataParallel,
    "DDP that finds unused parameters": lambda m: DistributedDataParallel(m, find_unused_parameters=True),
    "DDP of a static graph": lambda m: DistributedDataParallel(m, static_graph=True),
    "FSDP": fsdp,
    "FSDP of layers": lambda m: fsdp(m, layers=True),
    "FSDP2": fsdp2,
    "FSDP2 of layers": lambda m: fsdp2(m, layers=True),
}


@contextmanager
def full_gradients(name: str, model: nn.Module) -> Iterator[dict[str, Tensor]]:
    if name.startswith("FSDP2"):
        yield {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}  # type: ignore[attr-defined]
    elif name.startswith("FSDP"):
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            yield {name.replace("_fsdp_wrapped_module.", ""): gradient for name, gradient in found.items()}
    else:
        yield {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}


def work(rank: int, path: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=path, rank=rank, world_size=PROCESSES)
    expected, (x, y) = whole(), batch()
    x, y = x.chunk(PROCESSES)[rank], y.chunk(PROCESSES)[rank]
    failures = []
    for name, wrap in WRAPPED.items():
        for guided in ("the module, before", "the module, after", "the wrapper"):
            model = network()
            try:
                guidance = athena.Guidance(model, 2.0, scope="all") if guided.endswith("before") else None
                wrapped = wrap(model)
                if guidance is None:
                    guidance = athena.Guidance(model if guided.startswith("the module") else wrapped, 2.0, scope="all")
                for step in (1, 2):
                    wrapped.zero_grad()
                    F.cross_entropy(wrapped(x), y).backward()
                    assert guidance.step == step
                    with full_gradients(name, wrapped) as found:
                        assert found.keys() == expected.keys(), sorted(found)
                        for parameter, gradient in expected.items():
                            torch.testing.assert_close(found[parameter], gradient, rtol=1e-6, atol=1e-12)
                guidance.remove()
            except Exception as error:  # so that all of them are told
                failures.append(f"{name}, {guided}: {type(error).__name__}: {str(error)[:300]}")
    dist.destroy_process_group()
    assert not failures, "\n".join(failures)


@pytest.mark.slow
def test_gradients_in_two_processes_are_those_of_one_on_the_whole_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, ((tmp_path / "rendezvous").as_uri(),), nprocs=PROCESSES)  # type: ignore[no-untyped-call]


def refused(rank: int, path: str) -> None:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=path, rank=rank, world_size=PROCESSES)
    mesh, (x, y) = init_device_mesh("cpu", (PROCESSES,)), batch()
    for plan, where in (
        ({"1.0": ColwiseParallel(), "2": RowwiseParallel()}, "2"),
        ({"1.0": RowwiseParallel(input_layouts=Replicate())}, "1.0"),
        ({"2": ColwiseParallel(use_local_output=False)}, "2"),
    ):
        sentence = (
            rf"'{where}' uses tensor parallelism \(DTensor; under DDP and FSDP layers are whole\), and LRP has no"
        )
        model = parallelize_module(network(), mesh, plan)
        expected = model(x)
        with pytest.raises(athena.UnsupportedLayer, match=sentence):
            athena.lrp(model, x)
        with athena.Guidance(model, scope="all"), pytest.raises(athena.UnsupportedLayer, match=sentence):
            F.cross_entropy(model(x), y).backward()
        torch.testing.assert_close(model(x), expected)
    dist.destroy_process_group()


@pytest.mark.slow
def test_tensor_parallel_models_are_refused_in_one_sentence(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(refused, ((tmp_path / "rendezvous").as_uri(),), nprocs=PROCESSES)  # type: ignore[no-untyped-call]


def test_the_wrapper_is_guided_as_the_module_inside() -> None:
    model = network()
    parallel = nn.DataParallel(copy.deepcopy(model))
    with athena.Guidance(parallel, scope=["1.0"]) as guidance:
        assert guidance.model is parallel.module
        with pytest.raises(RuntimeError, match="guided already"):
            athena.Guidance(parallel.module)
