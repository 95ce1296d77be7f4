"""Typed settings of a training run: where they come from (preset, YAML file, key=value) and which values are allowed."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import yaml

from unidad.augment import AUGMENTATIONS, parse_kinds
from unidad.backbones.base import GRANULARITIES
from unidad.errors import SettingsError, did_you_mean
from unidad.heads import HEAD_KINDS
from unidad.losses import AGGREGATIONS, DENOISING_LOSSES, GAN_LOSSES
from unidad.noise import STUDENT_GRIDS, TIMESTEP_LAWS
from unidad.rollout import ROLLOUT_GRADS


@dataclass(frozen=True)
class LoopSettings:
    """What every training run has. Rates are per update; `cycles` is the length of the run."""

    seed: int = 0  # of weights, noise and the order of pictures
    device: str = "auto"  # auto | cpu | cuda | mps
    precision: str = "auto"  # auto | fp32 | bf16 (autocast; weights stay float32)
    cycles: int = 1000  # length of the run: one update of the student in each, k of the fake teacher, one of the target teacher
    max_minutes: float = 0.0  # stop early, saved and resumable, after so many minutes of training; 0: no limit
    batch_size: int = 8  # pictures an update
    accumulation: int = 1  # micro-batches per update
    lr: float = 1e-4
    lr_decay: str = "constant"  # constant | cosine (to 0 at the last cycle in which a network learns)
    warmup: int = 100  # updates of each network over which its rate rises from 0
    optimizer: str = "adamw"  # adamw | adamw8bit (both moments in 8 bits: about a quarter of their memory; extra `8bit`)
    offload_optimizer: bool = False  # moments lie in the computer's memory and come to the GPU for each update of their network
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.01
    clip: float = 10.0  # gradient norm per network
    non_finite: str = "stop"  # at a loss or gradient that is nan or infinite: stop | skip (that update; counted in log.jsonl)
    ema: float = 0.999  # of the product's weights, per cycle; 0: no averaging
    denoising_law: str = "uniform"  # of t where models learn: uniform | quadratic (more at little noise) | detail (still more)
    hflip: bool = True  # mirror pictures at random
    log_every: int = 10  # cycles
    sample_every: int = 100  # cycles between sample grids; 0: only at the end
    save_every: int = 200  # cycles between checkpoints; 0: only at the end
    keep: int = 2  # checkpoints kept
    tracker: str = "auto"  # auto (tensorboard when installed) | none | tensorboard | wandb


@dataclass(frozen=True)
class TrainSettings(LoopSettings):
    """A Uni-DAD run; METHOD §3-§7 explain the names."""

    source: str = "bundled:avatars"  # bundled:NAME | folder saved by diffusers | hub id
    method: str = "uni-dad"  # uni-dad | finetune | adapt-then-distill | distill-then-adapt (the last three are the paper's rivals)
    student_init: str = "source"  # source | bundled:NAME | folder of a distilled student
    target_teacher: str = "online"  # online | off | folder of a model already adapted to the target (frozen)
    class_label: int = -1  # of a class-conditional source; -1: none
    prompt: str = ""  # of a text-to-image source: what the pictures show, with a rare word for the subject ("a prt cat")
    class_prompt: str = ""  # the same without the rare word ("a cat"): what the source teacher is told
    prompts: str = ""  # of student samples besides the bare one: object | live | a file of lines such as "a {} in the snow"
    guidance: float = 1.0  # of classifier-free guidance on both teachers of a text-to-image source; 1: none
    lora_rank: int = 0  # of an adapter for each network on one shared base; 0: whole networks are trained
    steps: int = 3  # K
    timesteps: tuple[int, ...] = ()  # of the student, falling, such as 999,399; empty: those of steps and grid
    grid: str = "lcm"  # lcm | edm | fine (lcm that ends at little noise)
    rollout_grad: str = "all"  # all | last | random
    a: float = 0.25  # weight of the target teacher against the source teacher
    dmd_weight: float = 1.0  # of dual-domain distribution matching; 1 in the paper
    gan_weight: float = 0.01  # lambda_G
    disc_weight: float = 0.03  # lambda_D
    gan_loss: str = "bce"  # bce | hinge | lsgan | wgan-gp
    gan_aggregation: str = "per_head"  # per_head | mean_logit
    hflip_check: bool = False  # with hflip: not where the pictures look one way, so that mirrored ones are unlike the others
    cutmix_above: float = 1.0  # share of T: at more noise, models learn to denoise from pictures pieced together; 1: never
    recombine: int = 0  # so many more pictures, made of the colours and parts of these where they are flat drawings
    augment: str = "none"  # of what the heads see: none | any of flip,translate,colour,cutout, joined by commas
    augment_target: float = 0.0  # 0: that always; else as often as keeps the heads' mean sign on real pictures there (ADA: 0.6)
    heads: str = "multi"  # multi | single
    features: str = "stage"  # stage | layer
    anchor_weight: float = 0.0  # of the student's own denoising loss; 0 in the paper
    anchor: str = "pictures"  # from noised target pictures back to them | teacher: at each step to where its DDIM leads
    anchor_huber: float = 0.0  # of the anchor's errors, those far above this count by size, not by square; 0: all by square
    anchor_steps: int = 4  # of that DDIM, for each of the student's
    anchor_pool: int = 256  # trajectories of it kept, an eighth renewed every 16 cycles
    anchor_batch: int = 0  # pictures from them in each student update; 0: batch_size
    fake_updates: int = 5  # k
    reuse_batch: bool = True  # the student's own batch serves the first update of the fake teacher
    timestep_law: str = "uniform"  # uniform | karras | quadratic
    denoising: str = "epsilon"  # epsilon | v | edm
    shared_forward: bool = True  # one forward of the fake teacher for its own loss and the heads; without augment only
    joint_batch: bool = False  # the heads see real and fake pictures in one batch; same numbers, fewer and larger operations
    channels_last: bool = False  # weights and activations with channels innermost
    compile: bool = False  # torch.compile of plain predictions; not together with bf16 on a CPU
    source_teacher_dtype: str = "fp32"  # fp32 | bf16 (its weights held and computed with in bfloat16: half its memory)
    shard: bool = False  # share weights, moments and averages out over the processes (FSDP): less memory in each, more traffic
    gradient_checkpointing: bool = False  # keep less for the backward pass and compute it again: less memory, about a third slower
    lr_fake: float = 0.0  # of the fake teacher; 0: lr
    lr_heads: float = 0.0  # of the heads; 0: lr_fake
    lr_target: float = 0.0  # of the target teacher; 0: lr
    target_warmup: int = 0  # of the cycles, so many first ones train the target teacher alone
    target_cycles: int = 0  # of the cycles, so many first ones train the target teacher, which is frozen then; 0: all
    target_epochs: int = 0  # the target teacher learns no longer than until it has seen every picture so often; 0: no such limit
    transfer: float = 0.0  # of the target teacher's change of weights, added to the student's where it begins to learn


@dataclass(frozen=True)
class PretrainSettings(LoopSettings):
    """Training a source model, from scratch or from the weights of another."""

    init: str = "scratch"  # scratch | bundled:NAME | diffusers folder: its weights, shape and noise schedule are taken over
    size: int = 32
    widths: tuple[int, ...] = (24, 48, 96, 192)
    prediction_type: str = "v_prediction"
    beta_schedule: str = "squaredcos_cap_v2"
    denoising: str = "v"
    compile: bool = False  # torch.compile the network; not together with bf16 on a CPU
    cycles: int = 20_000
    batch_size: int = 32
    lr: float = 1e-3
    lr_decay: str = "cosine"
    beta2: float = 0.99
    clip: float = 1.0
    sample_every: int = 2000
    save_every: int = 1000


METHODS: tuple[str, ...] = ("uni-dad", "finetune", "adapt-then-distill", "distill-then-adapt")
CHOICES: dict[str, tuple[str, ...]] = {
    "method": METHODS,
    "anchor": ("pictures", "teacher"),
    "device": ("auto", "cpu", "cuda", "mps"),
    "precision": ("auto", "fp32", "bf16"),
    "optimizer": ("adamw", "adamw8bit"),
    "source_teacher_dtype": ("fp32", "bf16"),
    "lr_decay": ("constant", "cosine"),
    "non_finite": ("stop", "skip"),
    "tracker": ("auto", "none", "tensorboard", "wandb"),
    "grid": STUDENT_GRIDS,
    "rollout_grad": ROLLOUT_GRADS,
    "gan_loss": GAN_LOSSES,
    "gan_aggregation": AGGREGATIONS,
    "heads": HEAD_KINDS,
    "features": GRANULARITIES,
    "timestep_law": TIMESTEP_LAWS,
    "denoising_law": ("uniform", "quadratic", "detail"),
    "denoising": DENOISING_LOSSES,
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
}
S = TypeVar("S", bound=LoopSettings)
# (lowest, highest) allowed, both included.
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**31),
    "cycles": (1, 10**9),
    "max_minutes": (0, 10**6),
    "batch_size": (1, 65536),
    "accumulation": (1, 65536),
    **dict.fromkeys(("lr", "lr_fake", "lr_heads", "lr_target"), (0, 1)),
    "warmup": (0, 10**9),
    "beta1": (0, 0.99999),
    "beta2": (0, 0.99999),
    "weight_decay": (0, 1),
    "clip": (1e-12, 1e12),
    "ema": (0, 0.999999),
    "log_every": (1, 10**9),
    "sample_every": (0, 10**9),
    "save_every": (0, 10**9),
    "keep": (1, 10**6),
    "steps": (1, 64),
    "a": (0, 1),
    "guidance": (1, 100),
    "lora_rank": (0, 4096),
    **dict.fromkeys(("dmd_weight", "gan_weight", "disc_weight", "anchor_weight"), (0, 1e6)),
    "anchor_huber": (0, 1e6),
    "anchor_steps": (1, 300),
    "anchor_pool": (8, 10**6),
    "anchor_batch": (0, 65536),
    "fake_updates": (1, 10**6),
    "target_warmup": (0, 10**9 - 1),
    **dict.fromkeys(("target_cycles", "target_epochs"), (0, 10**9)),
    "transfer": (0, 2),
    "augment_target": (0, 1),
    "cutmix_above": (0, 1),
    "recombine": (0, 100_000),
    "class_label": (-1, 10**9),
    "size": (8, 4096),
}


def build_settings(kind: type[S], *layers: Mapping[str, Any]) -> S:
    """Lay settings over each other, later ones winning, and check every one.

    Raises:
        SettingsError: unknown key (with the nearest known one), wrong type, or value out of range.
    """
    known = {f.name: f for f in fields(kind)}
    values: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if key not in known:
                raise SettingsError(f"There is no setting '{key}'.{did_you_mean(key, known)}")
            values[key] = _convert(key, value, known[key].default)
    for key, value in values.items():
        _check(key, value)
    settings = kind(**values)
    _check_together(settings)
    return settings


def _convert(key: str, value: Any, default: Any) -> Any:
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", tuple: "a list of whole numbers"}[
        type(default)
    ]
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if isinstance(default, bool):
            if isinstance(value, str) and value.lower() in ("true", "yes", "on", "false", "no", "off"):
                return value.lower() in ("true", "yes", "on")
            if isinstance(value, bool):
                return value
        elif isinstance(default, tuple):
            items = value.replace(" ", "").split(",") if isinstance(value, str) else value
            return tuple(int(item) for item in items)
        elif isinstance(default, str):
            if isinstance(value, bool):  # YAML reads a bare off as false
                return "on" if value else "off"
            return str(value)
        elif not isinstance(value, bool):
            number = float(value)
            if isinstance(default, float):
                return number
            if number == int(number):
                return int(number)
    raise SettingsError(f"'{key}' must be {wanted}, not {value!r}.")


def _check(key: str, value: Any) -> None:
    if key in CHOICES and value not in CHOICES[key]:
        raise SettingsError(
            f"'{key}' must be one of {', '.join(CHOICES[key])}, not '{value}'.{did_you_mean(str(value), CHOICES[key])}"
        )
    if key in RANGES:
        low, high = RANGES[key]
        if not (math.isfinite(value) and low <= value <= high):
            raise SettingsError(f"'{key}' must lie between {low:.10g} and {high:.10g}, not {value:.10g}.")


def _check_together(settings: LoopSettings) -> None:
    if settings.offload_optimizer and settings.optimizer == "adamw8bit":
        raise SettingsError(
            "'offload_optimizer' moves the moments of plain AdamW only. Set optimizer=adamw, or offload_optimizer=false."
        )
    if isinstance(settings, PretrainSettings):
        side = 2 ** (len(settings.widths) - 1)
        if len(settings.widths) < 2 or any(w < 8 or w % 8 for w in settings.widths):
            raise SettingsError(f"'widths' must be two or more multiples of 8, not {list(settings.widths)}.")
        if settings.size % side:
            raise SettingsError(f"'size' must be a multiple of {side} for {len(settings.widths)} widths, not {settings.size}.")
    if not isinstance(settings, TrainSettings):
        return
    if settings.optimizer == "adamw8bit" and settings.channels_last:
        raise SettingsError(
            "'optimizer' adamw8bit puts weights back into plain layout. Set channels_last=false, or optimizer=adamw."
        )
    _check_shard(settings)
    steps = settings.timesteps
    if any(step < 0 for step in steps) or any(a <= b for a, b in pairwise(steps)):
        raise SettingsError(f"'timesteps' must fall and not be negative, such as 999,399, not {','.join(map(str, steps))}.")
    try:
        parse_kinds(settings.augment)
    except ValueError as error:
        kind = str(error)
        raise SettingsError(
            f"'augment' must be none or some of {', '.join(AUGMENTATIONS)}, not '{kind}'.{did_you_mean(kind, AUGMENTATIONS)}"
        ) from None
    if settings.augment_target and not parse_kinds(settings.augment):
        raise SettingsError(
            "'augment_target' says how often pictures are augmented, and 'augment' is none. Set augment=flip,translate."
        )
    if settings.source_teacher_dtype == "bf16":
        _check_source_teacher(settings)
    if settings.method in ("finetune", "distill-then-adapt"):
        if settings.method != "finetune" and settings.student_init == "source":
            raise SettingsError(
                "'method' distill-then-adapt starts from a distilled student. Make one with `unidad distill` and give it as student_init."
            )
        return
    if settings.method == "adapt-then-distill":
        _check_adapt_then_distill(settings)
    _check_uni_dad(settings)


def _check_adapt_then_distill(settings: TrainSettings) -> None:
    if settings.target_warmup == 0:
        raise SettingsError("'method' adapt-then-distill needs a first stage. Set target_warmup to its cycles.")
    if settings.dmd_weight == 0:
        raise SettingsError("'method' adapt-then-distill distils by distribution matching, and 'dmd_weight' is 0. Raise it.")
    if settings.target_teacher != "online":
        raise SettingsError("'method' adapt-then-distill adapts a target teacher of its own: leave target_teacher=online.")


def _check_source_teacher(settings: TrainSettings) -> None:
    if settings.lora_rank:
        raise SettingsError(
            "'source_teacher_dtype' is bf16, but with 'lora_rank' the source teacher is the base that every network shares. Leave it at fp32."
        )
    if settings.method != "uni-dad" or settings.a == 1 or settings.dmd_weight == 0:
        why = "'a' is 1" if settings.a == 1 else "'dmd_weight' is 0"
        why = why if settings.method == "uni-dad" else f"'method' is {settings.method}"
        raise SettingsError(f"'source_teacher_dtype' is bf16, but {why}: this run has no source teacher. Leave it at fp32.")


def _check_shard(settings: TrainSettings) -> None:
    names = ("lora_rank", "compile", "channels_last", "offload_optimizer")
    choices = ("gan_loss=wgan-gp", "optimizer=adamw8bit", "source_teacher_dtype=bf16")
    clash = [name for name in names if getattr(settings, name)]
    clash += [choice for choice in choices if getattr(settings, choice.split("=")[0]) == choice.split("=")[1]]
    if settings.shard and clash:
        raise SettingsError(f"'shard' does not go together with {clash[0]}. Leave one of them out.")


def _check_uni_dad(settings: TrainSettings) -> None:
    if settings.cycles <= settings.target_warmup:
        raise SettingsError(f"'target_warmup' is {settings.target_warmup} of {settings.cycles} cycles: no student would learn.")
    if 0 < settings.target_cycles < settings.target_warmup:
        raise SettingsError(
            f"'target_cycles' is {settings.target_cycles}, fewer than the {settings.target_warmup} of 'target_warmup'. Raise it."
        )
    if settings.transfer > 0 and (settings.a == 0 or settings.dmd_weight == 0):
        raise SettingsError(
            "'transfer' hands on what a target teacher learnt, and with a=0 or dmd_weight=0 there is none. Set transfer=0."
        )
    if settings.transfer > 0 and settings.target_teacher == "online" and settings.target_warmup == 0:
        raise SettingsError("'transfer' needs a target teacher that has learnt before the student begins: raise 'target_warmup'.")
    if settings.dmd_weight == 0 and settings.gan_weight == 0:
        raise SettingsError("'dmd_weight' and 'gan_weight' are both 0: the student would learn nothing. Raise one of them.")
    if settings.dmd_weight == 0 and settings.anchor_weight > 0 and settings.anchor == "teacher":
        raise SettingsError("'anchor' is a teacher, and with dmd_weight=0 there is none. Set anchor_weight=0, or anchor=pictures.")
    if settings.gan_weight > 0 and settings.disc_weight == 0:
        raise SettingsError(
            "'gan_weight' is above 0 but 'disc_weight' is 0: the heads would never learn. Raise 'disc_weight' or set both to 0."
        )
    if settings.target_teacher == "off" and settings.a > 0 and settings.dmd_weight > 0:
        raise SettingsError(f"'target_teacher' is off but 'a' is {settings.a:g}. Set a=0 for the source teacher alone.")


def read_config(path: str | Path) -> dict[str, Any]:
    """Settings from a YAML file of `key: value` lines.

    Raises:
        SettingsError: if it is missing, no YAML, or no such list.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise SettingsError(f"The settings file '{path}' cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"The settings file '{path}' is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict) or not all(isinstance(k, str) for k in content):
        raise SettingsError(f"The settings file '{path}' must hold lines such as 'steps: 3'.")
    return content


def parse_overrides(pairs: list[str]) -> dict[str, str]:
    """["a=0.5", ...] -> {"a": "0.5"}.

    Raises:
        SettingsError: where there is no '='.
    """
    result = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise SettingsError(f"'--set {pair}' must look like key=value, for example --set a=0.5.")
        result[key.strip()] = value.strip()
    return result


def told(kind: type[LoopSettings]) -> dict[str, str]:
    """What is said of each setting in this file, beside its name; nothing where its source is not at hand."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for each in reversed(kind.__mro__[:-1]):
            found |= re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(each), re.MULTILINE)
    return found


def as_dict(settings: LoopSettings) -> dict[str, Any]:
    """Settings as plain JSON-ready values."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(settings).items()}
