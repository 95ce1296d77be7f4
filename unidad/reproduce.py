"""The job `unidad reproduce`: run a run again from what its run.json says, and compare where both end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from unidad import adapt, checkpoint
from unidad.backbones.load import BUNDLED
from unidad.config import LoopSettings, PretrainSettings, TrainSettings, build_settings
from unidad.errors import CheckpointError, DataError
from unidad.pretrain import pretrain
from unidad.run import RUN_FILE, RunFolder

# On a GPU sums run in no fixed order. The bound is on |a - b| / |a| over all numbers of a network.
GPU_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Verdict:
    """How the repetition compares.

    Attributes:
        same: to the bit on a CPU, within `GPU_TOLERANCE` on a GPU.
        text: the same for people, with what differs and what may be why.
    """

    same: bool
    text: str


def reproduce(name: str | Path, out: str | Path, target: str | Path | None = None, console: Console | None = None) -> Verdict:
    """Run the run in `name` again into `out`, up to where its newest checkpoint at the end of a cycle stands, and compare them.

    Args:
        name: run folder of `train`, `finetune`, `distill` or `pretrain`, finished or not; only read.
        out: run folder of the repetition; new.
        target: the pictures, where they do not lie any more where the run found them.

    Raises:
        CheckpointError: no run there, no checkpoint at the end of a cycle, or a run in `out` already.
        UserError: pictures or models are missing or are not those of the run, or this machine lacks the run's device.
    """
    run = RunFolder(Path(name))
    facts = run.read()
    if facts.get("processes", 1) > 1:
        raise CheckpointError(f"'{run.path}' was made by {facts['processes']} processes; only runs of one can be reproduced.")
    if (Path(out) / RUN_FILE).exists():
        raise CheckpointError(f"'{out}' already holds a run, and a repetition starts anew. Give another --out.")
    place, before = _end_of_a_cycle(run)
    pictures = target or facts.get("data", {}).get("given")
    if not isinstance(pictures, str | Path) or not (str(pictures).startswith(BUNDLED) or Path(pictures).is_dir()):
        raise DataError(f"The pictures of '{run.path}' are not at '{pictures}'. Say where they are with --target FOLDER.")
    kind = TrainSettings if facts["kind"] == "train" else PretrainSettings
    pinned = {"device": facts.get("device", "auto"), "precision": facts.get("precision", "auto"), "max_minutes": 0, "keep": 1}
    settings = build_settings(kind, facts["settings"], pinned)
    again = _run_again(settings, pictures, out, facts.get("hashes", {}), place["cycle"], console)
    now, (_, after) = again.read(), _end_of_a_cycle(again)
    differences = _compare(before.tensors, after.tensors)
    head = f"cycle {place['cycle']}, on {facts.get('device')}; the repetition is in '{again.path}'"
    return _verdict(differences, str(facts.get("device")), head, _changed(facts, now))


def _end_of_a_cycle(run: RunFolder) -> tuple[dict[str, Any], checkpoint.Snapshot]:
    for name in reversed(checkpoint.names(run.checkpoints)):
        try:
            snapshot = checkpoint.load(run.checkpoints / name)
        except CheckpointError:
            continue
        place = snapshot.counters["place"]
        if place["phase"] == place["repeat"] == 0 < place["cycle"]:
            return place, snapshot
    raise CheckpointError(f"'{run.path}' has no whole checkpoint at the end of a cycle. Go on with --resume first.")


def _run_again(
    settings: LoopSettings, pictures: str | Path, out: str | Path, hashes: dict[str, str], until: int, console: Console | None
) -> RunFolder:
    if isinstance(settings, TrainSettings):
        return adapt.train(pictures, out, settings, console=console, until=until, expected=hashes)
    assert isinstance(settings, PretrainSettings)
    return pretrain(pictures, out, settings, console=console, until=until, expected=hashes)


def _compare(before: dict[str, dict[str, Tensor]], after: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """|a - b| / |a| of each group of tensors; 0 only if all bits agree, infinite where they do not even have the same names."""
    found = {}
    for group in sorted(before.keys() | after.keys()):
        a, b = before.get(group, {}), after.get(group, {})
        if a.keys() != b.keys() or any(t.shape != b[k].shape or t.dtype != b[k].dtype for k, t in a.items()):
            found[group] = float("inf")
        elif all(torch.equal(t, b[k]) for k, t in a.items()):
            found[group] = 0.0
        else:
            size = sum(float(t.double().square().sum()) for t in a.values()) ** 0.5
            apart = sum(float((t.double() - b[k].double()).square().sum()) for k, t in a.items()) ** 0.5
            found[group] = apart / max(size, 1e-30)
    return found


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is different about the surroundings: versions, threads, commit."""
    old, new = before.get("surroundings", {}), now["surroundings"]
    flat = [{**s.get("versions", {}), **{k: v for k, v in s.items() if k != "versions"}} for s in (old, new)]
    return [
        f"{k}: was {flat[0].get(k)}, now {flat[1].get(k)}" for k in sorted(flat[0] | flat[1]) if flat[0].get(k) != flat[1].get(k)
    ]


def _verdict(differences: dict[str, float], device: str, head: str, changed: list[str]) -> Verdict:
    apart = {group: value for group, value in differences.items() if value}
    weights = {group: value for group, value in apart.items() if group.startswith("network.") or group == "ema"}
    lines = [f"Compared at {head}."] + [f"  {group}: differs by {value:.3g} of its size" for group, value in apart.items()]
    lines += [f"  note: {sentence}" for sentence in changed]
    if not apart:
        return Verdict(True, "\n".join([*lines, "The same to the last bit: networks, optimizers, averages, random states."]))
    if device != "cpu" and all(value <= GPU_TOLERANCE for value in weights.values()):
        return Verdict(True, "\n".join([*lines, f"The same within tolerance: all networks within {GPU_TOLERANCE:g}."]))
    return Verdict(False, "\n".join([*lines, "Not the same."]))
