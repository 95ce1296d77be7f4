"""A training cycle against the same mathematics done the plain way, in alternation: what the shortcuts are worth.

    python benchmarks/plain_cycle.py --arch adm-32x64 --batch-size 4 --pairs 3

"Plain" is what a direct transcription of the method does, as the public research code does: every look of the heads runs the whole
fake teacher, decoder included, and throws the prediction away. Both sides draw fresh samples for each fake-teacher update but the
first, and neither lets one forward serve two losses, unless --shared-forward lets ours do so.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from types import MethodType

from torch import Tensor

from unidad.bench import Cycle, compare
from unidad.methods.unidad import UniDAD


def whole_forward_logits(self: UniDAD, x_t: Tensor, t: Tensor) -> Tensor:
    """What `UniDAD._logits` gives, from a forward pass through the whole network."""
    assert self.heads is not None
    _, features = self.fake_teacher.x0_and_features(x_t, t, self._labels(len(x_t)), self.o.features)
    return self.heads(features)


def plain(cycle: Cycle) -> Cycle:
    """The same cycle without the encoder-only shortcut."""
    method = cycle.trainer.method
    assert isinstance(method, UniDAD)
    method._logits = MethodType(whole_forward_logits, method)  # type: ignore[method-assign]
    return cycle


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="adm-32x64")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--shared-forward", action="store_true")
    args = parser.parse_args()
    values = {"batch_size": args.batch_size, "grid": "edm"}
    with tempfile.TemporaryDirectory() as folder:
        ours = Cycle.build(args.arch, values | {"shared_forward": args.shared_forward}, Path(folder) / "ours")
        theirs = plain(Cycle.build(args.arch, values | {"shared_forward": False}, Path(folder) / "plain"))
        flops = sum(ours.flops().values()) / sum(theirs.flops().values())
        result = compare(lambda: sum(ours.run().values()), lambda: sum(theirs.run().values()), args.pairs)
    print(json.dumps(vars(args) | {"flops_ratio": flops} | result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
