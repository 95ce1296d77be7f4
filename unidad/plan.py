"""`unidad train --plan`: what a run will hold in memory and compute, before a single weight is read.

The run's own phases are run on fake tensors, which have shapes and no numbers; what they keep for the backward pass is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from unidad.adapt import build_method
from unidad.architectures import TEXT_UNETS, text_unet
from unidad.backbones.base import Backbone
from unidad.backbones.load import find_folder, load_model, read_json
from unidad.backbones.load_text import is_text_to_image
from unidad.backbones.lora import LoraRole
from unidad.bench import matmul_rate
from unidad.config import TrainSettings
from unidad.data import PictureSet
from unidad.device import norms_in_float32, pick_device, use_bf16
from unidad.errors import SettingsError
from unidad.ingredients import Ingredients, fitting_steps
from unidad.ingredients_text import DRAWN_AT_ONCE, TextIngredients, gather_nothing
from unidad.methods.base import Method, Phase, only_training
from unidad.methods.unidad import UniDAD
from unidad.optimizers import moment_bytes
from unidad.sample import at_once

GB = 1e9
# On a CPU, by the rows of docs/fsig.md, "Memory": of what comes and goes the C library keeps a share in pieces that fit nothing (told to give
# them back it makes a cycle two thirds slower by page faults), and libraries take so many bytes when they are first used.
PIECES, FIRST_USE = 0.1, 50_000_000


@dataclass(frozen=True)
class Plan:
    """Bytes by part.

    Attributes:
        weights: of each network by name, of the "base" that adapters share, and "source as read" where the device is the CPU, which then holds it too;
            where networks are shared out, each one's share, and "put together" the two largest whole, as passes go through them.
        gradients: of the phase that has most; the others' are freed by then.
        optimizer: two moments of every trained network; those that stay on the device.
        average: the averaged product (EMA).
        activations: what each phase keeps for its backward pass, one micro-batch.
        drawing: the most that is alive while pictures of a sample grid are drawn, between the updates.
        stepping: with `offload_optimizer` the moments of the largest network, copied to the device for its update, when the
            activations are gone.
        offloaded: moments in the computer's memory, in no sum; on a CPU, which has but one memory, they are in `optimizer`.
        aside: what the libraries hold beside all that; of a CPU alone.
    """

    weights: dict[str, int]
    gradients: int
    optimizer: int
    average: int
    activations: dict[str, int]
    drawing: int = 0
    stepping: int = 0
    offloaded: int = 0
    aside: int = 0

    @property
    def passing(self) -> int:
        """Bytes that come and go, at the most: the gradients and activations of the phases that have most, or what drawing takes."""
        return max(self.gradients + max(self.stepping, *self.activations.values()), self.drawing)

    @property
    def total(self) -> int:
        """Bytes at the most: everything kept, what comes and goes, and what lies aside."""
        return sum(self.weights.values()) + self.optimizer + self.average + self.passing + self.aside


class _Alive(TorchDispatchMode):
    """Notes every storage that is made inside; `bytes` are those of the ones still alive, `most` the most that ever were, with `watch`."""

    def __init__(self, known: set[int], watch: bool = False) -> None:
        super().__init__()
        self._known, self._watch, self.most = known, watch, 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        if self._watch:
            self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
            self.most = max(self.most, self.bytes)
        return out

    @property
    def bytes(self) -> int:
        return sum(size for reference, size in self._made.values() if not reference.expired())


def plan(settings: TrainSettings, processes: int = 1) -> Plan:
    """Count a run with these settings; reads the models' configurations and no weights or pictures.

    `rollout_grad=random` is counted as a rollout of all steps with the gradient of the last.

    Args:
        processes: over which `shard` shares the networks out; what each of them holds is counted.

    Raises:
        UserError: as loading the models does.
    """
    with _fake_method(settings) as method:
        activations = {phase.name: _activations(method, phase, settings) for phase in _all_phases(method)}
        weights = {name: size(network) for name, network in method.networks.items()} | _base_size(method)
        drawing = _drawing(method, DRAWN_AT_ONCE if settings.prompt else None)

    def share(name: str, n: int) -> int:
        return n if name == "heads" else -(-n // processes)

    trained = {name: _trainable(method.networks[name]) for name in method.trained()}
    moments = [share(name, moment_bytes(method.networks[name].parameters(), settings)) for name in method.trained()]
    on_cpu = pick_device(settings.device).type == "cpu"
    away = sum(moments) if settings.offload_optimizer and not on_cpu else 0
    held = {name: share(name, n) for name, n in weights.items()}
    if processes > 1:
        held["put together"] = sum(sorted(n for name, n in weights.items() if name != "heads")[-2:])
    if on_cpu:
        held["source as read"] = weights.get("base", weights[method.product])
    found = Plan(
        weights=held,
        gradients=max(sum(trained[name] for name in phase.trains) for phase in method.phases),
        optimizer=sum(moments) - away,
        average=held[method.product] if settings.ema else 0,
        activations=activations,
        drawing=drawing,
        stepping=max(moments) if settings.offload_optimizer else 0,
        offloaded=away,
    )
    return replace(found, aside=round(PIECES * found.passing) + FIRST_USE) if on_cpu else found


def size(network: nn.Module) -> int:
    """Bytes of a network's weights and buffers."""
    return _trainable(network) + sum(b.numel() * b.element_size() for b in network.buffers())


def _trainable(network: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in network.parameters())


def _base(method: Method) -> nn.Module | None:
    """The network that the roles of a method share, where they are adapters."""
    product = method.networks[method.product]
    return product.unet if isinstance(product, LoraRole) else None


def _base_size(method: Method) -> dict[str, int]:
    base = _base(method)
    roles = sum(_trainable(method.networks[name]) for name in method.trained() if name != "heads")
    return {} if base is None else {"base": size(base) - roles}


def _text_parts(settings: TrainSettings) -> TextIngredients | None:
    """Where the source is a text-to-image folder or the name of such an architecture: it, without weights."""
    if settings.source in TEXT_UNETS:
        config = TEXT_UNETS[settings.source]
    elif is_text_to_image(settings.source):
        config = read_json(find_folder(settings.source) / "unet" / "config.json")
    else:
        return None
    return gather_nothing(settings, text_unet(config))


def _method_without_weights(settings: TrainSettings) -> Method:
    device, generator = torch.device("meta"), torch.Generator().manual_seed(0)
    text = _text_parts(settings)
    if text is not None:
        return build_method(settings, text, device, generator)
    source = load_model(settings.source, weights=False)
    steps = fitting_steps(settings, source)
    given = settings.target_teacher not in ("online", "off")
    nothing = PictureSet(torch.zeros(1, *source.backbone.shape, dtype=torch.uint8), ["none"], "none")
    init = None if settings.student_init == "source" else source
    parts = Ingredients(source, nothing, init, source if given else None, steps)
    return build_method(settings, parts, device, generator)


@contextmanager
def _fake_method(settings: TrainSettings) -> Iterator[Method]:
    """The run's method on fake tensors, which only live inside."""
    planned = replace(settings, cutmix_above=1.0)  # composites of pictures that nobody has read; they take no memory to speak of
    planned = replace(planned, rollout_grad="last") if settings.rollout_grad == "random" else planned
    method = _method_without_weights(planned)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for network in _modules(method):
            if isinstance(network, LoraRole):  # its adapter is emptied with the base
                network.prompts = torch.zeros(network.prompts.shape)
                continue
            network.to_empty(device="cpu")  # fake: where the numbers would be does not change how many there are
        if isinstance(method, UniDAD) and (pool := method.anchor_pool()) is not None:
            states, shape = len(method.student_steps), method.student.shape
            pool.draw = lambda n: torch.zeros(n, states, 2, *shape)  # what is kept of the teacher's passes
        yield method


def _modules(method: Method) -> list[nn.Module]:
    base = _base(method)
    return [*method.networks.values(), *([] if base is None else [base])]


def _all_phases(method: Method) -> list[Phase]:
    """Every phase of the run, whenever it begins."""
    return [phase for phase in method.phases if phase.repeats]


@contextmanager
def _as_in_training(method: Method, phase: Phase, settings: TrainSettings) -> Iterator[Tensor]:
    """Gradients, number format and pictures as the loop gives them to this phase."""
    shape = method.networks[method.product].shape
    assert isinstance(shape, tuple)
    device = pick_device(settings.device)
    bf16 = use_bf16(settings.precision, device)
    as_there = norms_in_float32() if bf16 and device.type == "cuda" else nullcontext()
    with only_training(method.networks, phase.trains), torch.autocast("cpu", torch.bfloat16, enabled=bf16), as_there:
        yield torch.zeros(settings.batch_size if phase.needs_data else 0, *shape)


def _activations(method: Method, phase: Phase, settings: TrainSettings) -> int:
    with _as_in_training(method, phase, settings) as pictures, _Alive(_storages(method)) as alive:
        losses = phase.loss(pictures)
        kept = alive.bytes
    del losses
    return kept


@torch.no_grad()
def _drawing(method: Method, n: int | None) -> int:
    """Of one prediction of `n` samples, or of as many as a grid draws together; in float32, as the loop draws outside of autocast."""
    product = method.networks[method.product]
    assert isinstance(product, Backbone)
    n = n or at_once(product.shape[-1])
    x, zeros = torch.zeros(n, *product.shape), torch.zeros(n, dtype=torch.long)
    with _Alive(_storages(method), watch=True) as alive:
        product.x0(x, zeros, None if product.num_classes is None else zeros)
    return alive.most + 3 * x.nbytes  # the noise, what it was drawn from, and the prediction before


def _storages(method: Method) -> set[int]:
    return {t.untyped_storage()._cdata for n in _modules(method) for t in [*n.parameters(), *n.buffers()]}


class Cost(NamedTuple):
    """What a phase computes: FLOPs in a cycle that it belongs to, and how many cycles of the run it does."""

    flops: int
    cycles: int


def phase_costs(settings: TrainSettings) -> dict[str, Cost]:
    """The cost of each phase, and of the trajectories that a student is regressed onto; later updates of a phase cost what its second does.

    Raises:
        UserError: as loading the models does.
    """
    counted = {}
    with _fake_method(settings) as method:
        pool = method.anchor_pool() if isinstance(method, UniDAD) else None
        for phase in _all_phases(method):
            found = [_update_flops(method, phase, settings) for _ in range(min(phase.repeats, 2))]
            flops = settings.accumulation * (found[0] + (phase.repeats - 1) * found[-1])
            last = settings.cycles if phase.ends is None else min(phase.ends, settings.cycles)
            counted[phase.name] = Cost(flops, max(0, last - phase.begins))
        if pool is not None and counted["student"].cycles:
            assert isinstance(method, UniDAD)
            cycles = counted["student"].cycles
            drawn = pool.drawn(cycles * settings.accumulation)
            counted["trajectories"] = Cost(round(drawn / cycles * _flops(partial(method.trajectories, 1))), cycles)
    return counted


def _update_flops(method: Method, phase: Phase, settings: TrainSettings) -> int:
    with _as_in_training(method, phase, settings) as pictures:
        found = _flops(lambda: phase.loss(pictures)["total"].backward())
    for name in phase.trains:
        method.networks[name].zero_grad(set_to_none=True)
    return found


def _flops(run: Callable[[], object]) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # not every fused kernel's FLOPs are known
        run()
    return counter.get_total_flops()


def room(device: torch.device) -> int | None:
    """Bytes that this device has free now, or None where it cannot be asked."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    import psutil

    return int(psutil.virtual_memory().available)


def sharing(settings: TrainSettings) -> int:
    """How many processes a run with `shard` is planned for: one for each GPU of this machine, two at least; 1 without."""
    return max(2, torch.cuda.device_count()) if settings.shard else 1


def memory_text(found: Plan, settings: TrainSettings) -> str:
    """The parts for people, and what the device has free."""
    device = pick_device(settings.device)
    free = room(device)
    parts = {
        **{f"weights, {name}": n for name, n in found.weights.items()},
        "gradients": found.gradients,
        "optimizer": found.optimizer,
        "average (EMA)": found.average,
        **{f"activations, {name}": n for name, n in found.activations.items()},
        "drawing a grid, between updates": found.drawing,
    }
    if found.aside:
        parts["held aside by libraries"] = found.aside
    if settings.offload_optimizer:
        parts |= {"optimizer, while it steps": found.stepping, "optimizer, kept off the device": found.offloaded}
    each = f", in each of {sharing(settings)} processes" if settings.shard else ""
    lines = [
        f"memory for {settings.source} on {device.type}{each}, GB (expected)",
        *(f"  {name:<32}{n / GB:>9.3f}" for name, n in parts.items()),
    ]
    lines.append(f"  {'at the most':<32}{found.total / GB:>9.3f}" + (f"  of {free / GB:.1f} free" if free is not None else ""))
    return "\n".join(lines)


def computation_text(costs: Mapping[str, Cost], settings: TrainSettings) -> str:
    """FLOPs for people, and the time that a matrix product's rate here, measured now, allows."""
    device = pick_device(settings.device)
    rate = matmul_rate(device, torch.bfloat16 if use_bf16(settings.precision, device) else torch.float32)
    seconds = sum(cost.flops * cost.cycles for cost in costs.values()) / rate
    lines = ["computation, GFLOP a cycle"]
    lines += [f"  {name:<30}{cost.flops / 1e9:>9.1f}  in {cost.cycles} cycles" for name, cost in costs.items()]
    lines.append(
        f"at least {seconds / settings.cycles:.2f} s a cycle on average and {seconds / 3600:.2f} h for {settings.cycles} cycles, "
        f"at a matrix product's rate here ({rate / 1e9:.0f} GFLOP/s); `unidad bench train` says what share of it is reached"
    )
    return "\n".join(lines)


def refuse_too_large(found: Plan, settings: TrainSettings, free: int | None = None) -> None:
    """Do nothing where the run fits into `free` bytes (None: what the device has free now).

    Raises:
        SettingsError: it does not; says what lowers it.
    """
    free = room(pick_device(settings.device)) if free is None else free
    if free is None or found.total <= free:
        return
    advice = [
        ("gradient_checkpointing=true", not settings.gradient_checkpointing),
        (
            "source_teacher_dtype=bf16",
            "source_teacher" in found.weights and settings.source_teacher_dtype == "fp32" and not settings.lora_rank,
        ),
        ("optimizer=adamw8bit", settings.optimizer == "adamw" and not settings.offload_optimizer),
        (
            "offload_optimizer=true",
            pick_device(settings.device).type == "cuda" and settings.optimizer == "adamw" and not settings.offload_optimizer,
        ),
        ("shard=true in a process for each GPU", torch.cuda.device_count() > 1 and not settings.shard),
        ("lora_rank=64", bool(settings.prompt) and not settings.lora_rank),
        ("rollout_grad=last", settings.rollout_grad == "all" and settings.steps > 1),
        ("batch_size=1 (with accumulation= to make up for it)", settings.batch_size > 1),
        ("precision=bf16", not use_bf16(settings.precision, pick_device(settings.device))),
        ("ema=0", settings.ema > 0),
    ]
    lower = ", ".join(f"--set {text}" for text, helps in advice if helps) or "a smaller source, or a device with more memory"
    raise SettingsError(
        f"This run needs about {found.total / GB:.1f} GB and the device has {free / GB:.1f} GB free. What lowers it: {lower}."
    )
