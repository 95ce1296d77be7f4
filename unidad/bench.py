"""What a training cycle, a drawing or an evaluation costs here: seconds, counted FLOPs, their share of a matmul's rate, memory."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from unidad.adapt import build_method, network_rates
from unidad.architectures import TEXT_UNETS, random_model
from unidad.backbones.base import Backbone
from unidad.backbones.load import Model
from unidad.backbones.unet2d_cond import UNet2DCondBackbone
from unidad.config import TrainSettings, build_settings
from unidad.data import PictureSet
from unidad.device import make_accelerator, pick_device, use_bf16
from unidad.errors import SettingsError
from unidad.ingredients import Ingredients, fitting_steps
from unidad.ingredients_text import gather_nothing
from unidad.log import Log
from unidad.metrics.extractors import load_extractor
from unidad.run import RunFolder
from unidad.sample import draw
from unidad.train import Trainer

Values = Mapping[str, Any]
# The reference cycle of the cost model: K = 3, k = 5, both teachers, the target teacher trained, one head per layer.
REFERENCE: dict[str, Any] = {
    "steps": 3,
    "fake_updates": 5,
    "a": 0.5,
    "features": "layer",
    "precision": "fp32",
    "warmup": 0,
    "ema": 0.0,
}
# What a text-to-image shape needs besides: words that say nothing, as its prompts are random too.
TOLD: dict[str, Any] = {"prompt": "a prt cat", "class_prompt": "a cat"}
PICTURES = 10


def _attention(*shapes: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(*shapes[:3])


def _attention_backward(_grad: Any, *shapes: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * sdpa_flop_count(*shapes[:3])  # without what a fused kernel computes a second time


# Fused attention, whose FLOPs torch does not know on a CPU, and on a GPU counts with the recomputation.
_FUSED = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
COUNTED = {getattr(torch.ops.aten, f"_scaled_dot_product_{name}"): _attention for name in _FUSED}
COUNTED |= {getattr(torch.ops.aten, f"_scaled_dot_product_{name}_backward"): _attention_backward for name in _FUSED}


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 1024, repeats: int = 8) -> float:
    """FLOP/s of a square matrix product of that dtype, the best of `repeats`: what the chip gives, measured beside the rest."""
    size = size if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(repeats + 1):  # the first also warms up
        _synchronise(device)
        start = time.perf_counter()
        a @ a
        _synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory(device: torch.device) -> float:
    """Bytes: on a GPU the most that was allocated, on a CPU the most that the whole process ever held."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        import psutil

        return float(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


def _random_ingredients(model: Model, settings: TrainSettings, count: int) -> Ingredients:
    """That model and `count` random pictures, or latents."""
    if isinstance(model.backbone, UNet2DCondBackbone):
        return gather_nothing(settings, model.backbone, count)
    generator = torch.Generator().manual_seed(settings.seed)
    pixels = torch.randint(0, 256, (count, *model.backbone.shape), generator=generator, dtype=torch.uint8)
    pictures = PictureSet(pixels, [f"random {i}" for i in range(count)], "random")
    return Ingredients(model, pictures, None, None, fitting_steps(settings, model))


@dataclass
class Cycle:
    """One architecture and one set of settings, ready to be run cycle by cycle through the real loop."""

    trainer: Trainer
    device: torch.device

    @classmethod
    def build(cls, arch: str, values: Values, folder: Path, count: int = PICTURES, model: Model | None = None) -> Cycle:
        """Random weights, those of `model` where it is given, and `count` random pictures; `values` lie over `REFERENCE`.

        Raises:
            SettingsError: for an unknown architecture or setting.
        """
        told = TOLD if arch in TEXT_UNETS else {}
        settings = build_settings(TrainSettings, REFERENCE, told, {"tracker": "none", "cycles": 10**6}, values)
        device, parts = pick_device(settings.device), _random_ingredients(model or random_model(arch), settings, count)
        folder.mkdir(parents=True, exist_ok=True)
        run = RunFolder(folder)
        source = torch.Generator(device).manual_seed(settings.seed)
        method = build_method(settings, parts, device, source)
        accelerator = make_accelerator(settings, run)
        stream = parts.stream(settings, device)
        log = Log(run, accelerator)
        return cls(Trainer(method, stream, settings, run, log, source, accelerator, rates=network_rates(settings)), device)

    def run(self) -> dict[str, float]:
        """Run one cycle; seconds of each phase."""
        spent: dict[str, float] = {}
        for phase in self.trainer.method.cycle_phases(self.trainer.place.cycle):
            _synchronise(self.device)
            start = time.perf_counter()
            for _ in range(phase.repeats):
                self.trainer.update(phase)
            _synchronise(self.device)
            spent[phase.name] = time.perf_counter() - start
        return spent

    def log_line(self) -> float:
        """Write the log line of the cycles since the last one; its seconds."""
        _synchronise(self.device)
        start = time.perf_counter()
        self.trainer.write_log()
        return time.perf_counter() - start

    def flops(self) -> dict[str, int]:
        """Run one cycle and count each phase's FLOPs from its graph (attention by its plain formula)."""
        counted = {}
        for phase in self.trainer.method.cycle_phases(self.trainer.place.cycle):
            with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
                for _ in range(phase.repeats):
                    self.trainer.update(phase)
            counted[phase.name] = counter.get_total_flops()
        return counted

    def forward_flops(self) -> int:
        """FLOPs of one full forward of one picture: the F of the cost model."""
        network = self.trainer.method.networks[self.trainer.method.product]
        assert isinstance(network, Backbone)
        x, zero = torch.zeros(1, *network.shape, device=self.device), torch.zeros(1, dtype=torch.long, device=self.device)
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            network.x0(x, zero, None if network.num_classes is None else zero)
        return counter.get_total_flops()


def bench_train(arch: str, values: Values, cycles: int, folder: Path) -> dict[str, Any]:
    """Cost of a training cycle: medians over `cycles` after one to warm up.

    Returns:
        Ready for JSON: "seconds" a cycle and by phase, "flops" a cycle and by phase, "forwards" (the cycle in units of one full
        forward of its batch), "images_per_second" (student samples learned from), "peak_bytes", "matmul_flops_per_second",
        "share", the cycle's FLOPs over its seconds as a share of that, and "log_share", what a log line every `log_every` cycles adds.

    Raises:
        SettingsError: for an unknown architecture or setting, or fewer than 1 cycle.
    """
    if cycles < 1:
        raise SettingsError(f"--cycles must be at least 1, not {cycles}.")
    cycle = Cycle.build(arch, values, folder)
    s, device = cycle.trainer.settings, cycle.device
    cycle.run()
    cycle.log_line()
    runs, lines = zip(*[(cycle.run(), cycle.log_line()) for _ in range(cycles)], strict=True)
    peak = peak_memory(device)
    flops = cycle.flops()
    seconds = {name: statistics.median(run[name] for run in runs) for name in flops}
    total = statistics.median(sum(run.values()) for run in runs)
    dtype = torch.bfloat16 if use_bf16(s.precision, device) else torch.float32
    rate = matmul_rate(device, dtype)
    batch = s.batch_size * s.accumulation
    return {
        "arch": arch,
        "settings": dict(REFERENCE | dict(values)),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "cycles": cycles,
        "seconds": {"cycle": total} | seconds,
        "flops": {"cycle": sum(flops.values())} | flops,
        "forwards": sum(flops.values()) / (batch * cycle.forward_flops()),
        "images_per_second": batch / total,
        "peak_bytes": peak,
        "matmul_flops_per_second": rate,
        "share": sum(flops.values()) / total / rate,
        "log_share": statistics.median(lines) / s.log_every / total,
    }


def compare(first: Callable[[], float], second: Callable[[], float], pairs: int) -> dict[str, Any]:
    """Run two things in alternation; the ratio of their seconds, pair by pair.

    The first pair warms up and is left out; which of the two goes first alternates.

    Returns:
        "ratio" (median of first / second), "low" and "high" (quartiles), "first" and "second" (median seconds), "pairs".
    """
    times: list[tuple[float, float]] = []
    for i in range(pairs + 1):
        if i % 2:
            b, a = second(), first()
        else:
            a, b = first(), second()
        times.append((a, b))
    ratios = sorted(a / b for a, b in times[1:])
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else [ratios[0]] * 3
    medians = [statistics.median(side) for side in zip(*times[1:], strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "low": low,
        "high": high,
        "first": medians[0],
        "second": medians[1],
        "pairs": pairs,
    }


def compare_train(arch: str, first: Values, second: Values, pairs: int, folder: Path) -> dict[str, Any]:
    """`compare` of training cycles under two sets of settings.

    Raises:
        SettingsError: for an unknown architecture or setting, or fewer than 1 pair.
    """
    if pairs < 1:
        raise SettingsError(f"--cycles must be at least 1, not {pairs}.")
    a, b = Cycle.build(arch, first, folder / "first"), Cycle.build(arch, second, folder / "second")
    sides = {"arch": arch, "settings": [dict(first), dict(second)], "threads": torch.get_num_threads()}
    return sides | compare(lambda: sum(a.run().values()), lambda: sum(b.run().values()), pairs)


def bench_sample(arch: str, n: int, steps: int, batch_size: int, device: str = "auto", precision: str = "fp32") -> dict[str, Any]:
    """Cost of drawing `n` pictures (of latents: without the VAE) in `steps` network evaluations each, after one batch to warm up.

    Raises:
        SettingsError: for an unknown architecture, or numbers below 1.
    """
    if min(n, steps, batch_size) < 1:
        raise SettingsError("-n, --steps and --batch-size must be at least 1.")
    place = pick_device(device)
    backbone = random_model(arch).backbone.to(place)
    grid, label = backbone.schedule.student_steps(steps), None if backbone.num_classes is None else 0
    draw_some = partial(draw, backbone, steps=grid, batch_size=batch_size, label=label, bf16=use_bf16(precision, place))
    draw_some(min(n, batch_size))
    _synchronise(place)
    start = time.perf_counter()
    draw_some(n)
    _synchronise(place)
    seconds = time.perf_counter() - start
    facts = {"arch": arch, "n": n, "steps": steps, "batch_size": batch_size, "threads": torch.get_num_threads()}
    facts |= {"precision": precision}
    return facts | {"seconds": seconds, "images_per_second": n / seconds, "peak_bytes": peak_memory(place)}


def bench_evaluate(extractor: str, n: int, size: int) -> dict[str, Any]:
    """Cost of the features of `n` random pictures of that side.

    Raises:
        SettingsError: for an unknown extractor, or numbers below 1.
    """
    if min(n, size) < 1:
        raise SettingsError("-n and --size must be at least 1.")
    judge = load_extractor(extractor, device=pick_device("cpu"))
    pixels = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    judge(pixels[:8])
    start = time.perf_counter()
    judge(pixels)
    seconds = time.perf_counter() - start
    return {"extractor": judge.name, "n": n, "size": size, "seconds": seconds, "images_per_second": n / seconds}
