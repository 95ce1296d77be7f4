"""A method is a list of phases; a phase says which networks learn, how often in a cycle, and from which loss.

Methods know losses and backbones; the loop that runs them (train.py) knows neither.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

Losses = dict[str, Tensor]
# What an update of a phase costs, in plain updates of one network at the same batch size; measured on the bundled model, for the time left.
COSTS: dict[str, float] = {"student": 4.0, "fake_teacher": 2.0}


@dataclass(frozen=True)
class Phase:
    """One kind of update.

    Attributes:
        name: shown in logs.
        trains: names of the networks that learn in it; no other network receives a gradient.
        repeats: updates per cycle.
        loss: real pictures [B, C, H, W] in [-1, 1]; where each has a condition of its own, their labels [B] int64, else None; where they
            have masks, these, [B, 1, H, W] in [0, 1], else None -> named scalar terms; "total" is what is minimised.
        needs_data: False where the loss looks at no real picture; it is then given an empty batch.
        begins, ends: the first cycle it belongs to, and the first that it no longer does (None: it stays to the end).
    """

    name: str
    trains: tuple[str, ...]
    repeats: int
    loss: Callable[..., Losses]
    needs_data: bool = True
    begins: int = 0
    ends: int | None = None


class Method(ABC):
    """Networks and the phases that train them.

    Attributes:
        networks: every network by name, frozen ones too.
        phases: one cycle, in order.
        product: the name of the network that the run is for.
        student_steps: timesteps of the product if it is a few-step student, else None.
    """

    networks: Mapping[str, nn.Module]
    phases: list[Phase]
    product: str
    student_steps: list[int] | None = None

    def carried(self) -> list[Tensor]:
        """Tensors that one update hands to a later one; a checkpoint in mid cycle needs them."""
        return []

    def carried_rows(self) -> int:
        """How many of `carried`, the first ones, have a row for each picture of a batch; the others belong to the run as a whole."""
        return 0

    def restore(self, carried: list[Tensor]) -> None:
        """Take back what `carried` gave."""
        if carried:
            raise ValueError("this method carries nothing between updates")

    def start_cycle(self, cycle: int) -> tuple[str, ...]:
        """Called before a cycle's first update, and again if the run is resumed there: where one stage hands weights to the next.

        Returns the names of the networks whose weights it replaced; averaging starts over from them.
        """
        return ()

    def cycle_phases(self, cycle: int) -> list[Phase]:
        """Phases of one cycle, in order."""
        return [p for p in self.phases if p.repeats and p.begins <= cycle and (p.ends is None or cycle < p.ends)]

    def work(self, cycles: int) -> float:
        """About how much is computed in so many first cycles, in plain updates of one network: phases begin and end, and cost unlike."""
        spans = [(p, min(cycles, cycles if p.ends is None else p.ends) - p.begins) for p in self.phases]
        return sum(COSTS.get(p.name, 1.0) * p.repeats * max(0, span) for p, span in spans)

    def trained(self) -> list[str]:
        """Names of the networks that some phase trains, in a fixed order."""
        return [name for name in self.networks if any(name in phase.trains for phase in self.phases)]


@contextmanager
def only_training(networks: Mapping[str, nn.Module], trains: tuple[str, ...]) -> Iterator[None]:
    """Inside, only the networks named in `trains` are in train mode and require gradients; afterwards all is as before."""
    modes = {name: network.training for name, network in networks.items()}
    flags = [(p, p.requires_grad) for network in networks.values() for p in network.parameters()]
    try:
        for name, network in networks.items():
            network.train(name in trains)
            network.requires_grad_(name in trains)
        yield
    finally:
        for name, network in networks.items():
            network.train(modes[name])
        for parameter, flag in flags:
            parameter.requires_grad = flag
