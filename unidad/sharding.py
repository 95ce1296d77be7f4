"""Weights, moments and averages shared out over the processes of a run (torch's `fully_shard`, FSDP2).

Each network is one unit: it is put together where a pass through it begins, and given back where that ends, forward and backward alike.
The finer units that FSDP is mostly used with would be entered and never left by `features`, which leaves the network after its encoder.
Gradients come out of the backward pass averaged, so that `distributed.Ranks` has nothing to do for these networks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

PASSES = ("x0", "features", "x0_and_features")  # a Backbone's; nothing calls its forward


def share_out(networks: Iterable[nn.Module], device: torch.device) -> None:
    """From here on each process holds its share of these networks; in place. Those without a Backbone's passes (heads) stay whole.

    All processes must ask, and must take every later pass through such a network together.
    """
    from torch.distributed.device_mesh import init_device_mesh  # here, for the sake of torches that were built without all this
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    # torch keeps the mesh in caches to the end, and the mesh the processes' connection, in what torch.compile alone reads. The connection
    # must not outlive Python: see `distributed.connected`.
    getattr(mesh, "_pg_registry", {}).clear()
    for network in networks:
        if all(hasattr(network, name) for name in PASSES):
            fully_shard(network, mesh=mesh, reshard_after_forward=True)
            for name in PASSES:
                register_fsdp_forward_method(network, name)


def is_shared_out(network: nn.Module) -> bool:
    """Whether this process holds only its share of a network."""
    return hasattr(network, "set_requires_gradient_sync")  # an FSDPModule


def in_full(x: Tensor) -> Tensor:
    """A tensor that was shared out, whole in every process, which must all ask; any other is itself."""
    return x.full_tensor() if _is_share(x) else x


def share_like(x: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor the share of this process, where `like` is shared out and on its device; else x itself."""
    if not _is_share(like):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _is_share(x: Tensor) -> TypeGuard[DTensor]:
    return hasattr(x, "full_tensor")


def load_whole(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`network.load_state_dict` with whole tensors, into a network that may be shared out.

    Raises:
        RuntimeError, ValueError: if names or shapes differ.
    """
    own = network.state_dict()
    network.load_state_dict({k: share_like(v, own[k]) if k in own else v for k, v in state.items()}, strict=True)


def whole_state(state: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The tensors of a state dict in full; those that were shared out on the host, and only with `keep`. All processes must ask."""
    whole: dict[str, Tensor] = {}
    for name, x in state.items():
        full = in_full(x)
        if full is x:
            whole[name] = x
        elif keep:
            whole[name] = full.cpu()
    return whole


def whole_copy(network: nn.Module, into: nn.Module) -> nn.Module:
    """`into`, a whole network of the same architecture, with the weights of one that is shared out; all processes must ask."""
    into.load_state_dict({k: in_full(v) for k, v in network.state_dict().items()}, strict=True)
    return into
