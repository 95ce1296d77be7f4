"""A training cycle against the same mathematics done the plain way, in alternation: what the shortcuts are worth.

    python benchmarks/plain_cycle.py --arch adm-32x64 --batch-size 4 --pairs 3

"Plain" stands for the public research code, read forward by forward; both sides run in this library's loop. What it does, and where
(github.com/yaramohamadi/uni-DAD, folder 1_FSIG, and its earlier home github.com/yaramohamadi/DMD2):

- decoder: `extract_multi_scale_features` (main/dhariwal/dhariwal_network.py, DMD2 at 5fab099) runs the whole network for each look of
  the heads and throws the prediction away; `compute_guidance_clean_cls_loss` (main/dhariwal/dhariwal_guidance.py) looks at real and
  fake pictures separately, and `compute_loss_fake` there has a forward of its own.
- attention: `QKVAttentionLegacy` (third_party/dhariwal/guided_diffusion/unet.py at 90de3f9) holds the whole matrix of weights, and
  `AttentionBlock.forward` there computes it a second time in the backward pass, whatever use_checkpoint says.
- optimizer: `torch.optim.AdamW` with its defaults (main/dhariwal/train_dhariwal.py), which on a CPU updates one tensor after the other.

Like ours, it draws the samples of the other k - 1 fake-teacher updates without a graph, lets the student's batch serve the first, keeps
the guidance networks' weights out of the student's backward pass, and trains the target teacher once a cycle. Two things are left out
here, in its favour: it records a graph for the fake teacher's score, which nobody goes back through, and it does not ask the allocator
to keep freed memory (`unidad.device.keep_freed_memory`), which here holds for the whole process.

Both sides have their times as wall-clock and as the process's own time; on a machine that does other things look at the latter, with
OMP_NUM_THREADS=1, as waiting threads count as well.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MethodType

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from unidad.backbones.unet2d import UNet2DBackbone
from unidad.bench import Cycle, compare
from unidad.methods.unidad import UniDAD


def whole_forward_logits(self: UniDAD, x_t: Tensor, t: Tensor) -> Tensor:
    """What `UniDAD._logits` gives, from a forward pass through the whole network."""
    assert self.heads is not None
    _, features = self.fake_teacher.x0_and_features(x_t, t, self._labels(len(x_t)), self.o.features)
    return self.heads(features)


def run_whole_network(method: UniDAD) -> None:
    """No shortcut through the encoder."""
    method._logits = MethodType(whole_forward_logits, method)  # type: ignore[method-assign]


def unfuse_attention(method: UniDAD) -> None:
    """Attention weights as a tensor, computed again in the backward pass."""
    for network in method.networks.values():
        for module in network.modules():
            if isinstance(module, Attention):
                module.set_processor(AttnProcessor())
                module.forward = partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]


def use_plain_optimizers(cycle: Cycle) -> None:
    """AdamW tensor by tensor."""
    s = cycle.trainer.settings
    for name, rate in cycle.trainer.rates.items():
        parameters = cycle.trainer.method.networks[name].parameters()
        cycle.trainer.optimizers[name] = torch.optim.AdamW(
            parameters, lr=rate, betas=(s.beta1, s.beta2), weight_decay=s.weight_decay
        )


WASTE: dict[str, Callable[[Cycle, UniDAD], None]] = {
    "decoder": lambda _, method: run_whole_network(method),
    "attention": lambda _, method: unfuse_attention(method),
    "optimizer": lambda cycle, _: use_plain_optimizers(cycle),
}


def plain(cycle: Cycle, waste: list[str]) -> Cycle:
    """The same cycle without these shortcuts."""
    method = cycle.trainer.method
    assert isinstance(method, UniDAD)
    for name in waste:
        WASTE[name](cycle, method)
    return cycle


def compile_counted(side: Side) -> None:
    """Compile its networks, after a run in which the FLOPs are counted: compiled kernels are not seen by the counter."""
    side.run()
    side.own.clear()
    for network in side.cycle.trainer.method.networks.values():
        if isinstance(network, UNet2DBackbone):
            network.compile_unet()


@dataclass
class Side:
    """One of the two; keeps what `compare` does not look at.

    Attributes:
        own: seconds of the process itself, run by run.
        flops: of a cycle, counted in the first run, which `compare` leaves out.
    """

    name: str
    cycle: Cycle
    own: list[float] = field(default_factory=list)
    flops: int = 0

    def run(self) -> float:
        """A cycle's wall-clock seconds."""
        start, own = time.perf_counter(), time.process_time()
        if self.flops:
            self.cycle.run()
        else:
            self.flops = sum(self.cycle.flops().values())
        wall = time.perf_counter() - start
        self.own.append(time.process_time() - own)
        print(f"{self.name}: {wall:.1f} s, of which its own {self.own[-1]:.2f}", file=sys.stderr, flush=True)
        return wall


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="adm-32x64")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--shared-forward", action="store_true", help="let ours serve two losses with one forward")
    parser.add_argument("--compile", action="store_true", help="compile our side (its first cycle then takes minutes)")
    parser.add_argument("--waste", nargs="+", choices=WASTE, default=list(WASTE), help="what the plain side does; all by default")
    args = parser.parse_args()
    values = {"batch_size": args.batch_size, "grid": "edm"}
    with tempfile.TemporaryDirectory() as folder:
        ours = Cycle.build(args.arch, values | {"shared_forward": args.shared_forward}, Path(folder) / "ours")
        theirs = plain(Cycle.build(args.arch, values | {"shared_forward": False}, Path(folder) / "plain"), args.waste)
        sides = Side("ours", ours), Side("plain", theirs)
        if args.compile:
            compile_counted(sides[0])
        wall = compare(sides[0].run, sides[1].run, args.pairs)
    again = [iter(side.own) for side in sides]  # the same pairs by their other times
    process = compare(lambda: next(again[0]), lambda: next(again[1]), args.pairs)
    one = args.batch_size * ours.forward_flops()
    forwards = [side.flops / one for side in sides]
    facts = {"threads": torch.get_num_threads(), "forwards": forwards, "flops_ratio": forwards[0] / forwards[1]}
    print(json.dumps(vars(args) | facts | {"wall": wall, "process": process}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
