"""Named runs: each preset is a row of settings over the defaults. Sources are in docs/presets.md; METHOD §7 has the paper's."""

from __future__ import annotations

from typing import Any

# The bundled 32x32 avatars on a CPU: a distilled student to start from, many cheap cycles, rates for a 6 M-parameter network.
_AVATARS: dict[str, Any] = {
    "source": "bundled:avatars",
    "student_init": "bundled:avatars-3step",
    "steps": 3,
    "grid": "fine",
    "rollout_grad": "random",
    "timestep_law": "quadratic",
    "denoising": "v",
    "denoising_law": "quadratic",
    "a": 0.75,
    "anchor": "teacher",
    "anchor_weight": 20.0,
    "anchor_batch": 16,
    "gan_weight": 0.1,
    "disc_weight": 0.3,
    "features": "layer",
    "augment": "flip,translate",
    "hflip_check": True,
    "fake_updates": 1,
    "batch_size": 8,
    "lr": 4e-4,
    "lr_decay": "cosine",
    "lr_fake": 4e-4,
    "lr_heads": 1e-4,
    "lr_target": 2e-4,
    "beta2": 0.99,
    "warmup": 20,
    "transfer": 1.0,
    "ema": 0.99,
}

# Within ten minutes where the CPU has no bf16. Photos, of which no more can be made, are learnt from for a shorter time.
_DEMO: dict[str, Any] = {
    "recombine": 1000,
    "target_warmup": 800,
    "target_cycles": 800,
    "target_epochs": 240,
    "lr_target": 1.6e-3,
    "anchor_weight": 6.0,
    "anchor_huber": 0.03,
}

# An hour: a target teacher that learns long, mostly at little noise, from recombined pictures; at much noise from composites where
# there are none. Of four steps the last two take away what the others leave.
_LONG: dict[str, Any] = {
    "steps": 4,
    "recombine": 2000,
    "denoising_law": "detail",
    "cutmix_above": 0.5,
    "target_warmup": 4800,
    "target_cycles": 4800,
    "target_epochs": 480,
    "lr_target": 1.6e-3,
    "anchor_weight": 6.0,
    "anchor_huber": 0.03,
    "anchor_batch": 32,
    "cycles": 5550,
}

# METHOD §7: the paper's few-shot track at FFHQ 256.
_FSIG: dict[str, Any] = {
    "steps": 3,
    "lr": 2e-6,
    "warmup": 500,
    "batch_size": 1,
    "gan_weight": 0.01,
    "disc_weight": 0.03,
    "fake_updates": 5,
    "cycles": 8000,
    "features": "layer",
    "precision": "auto",
}

# METHOD §7: the paper's subject-driven track on Stable Diffusion 1.5.
_SDP: dict[str, Any] = {
    "steps": 1,
    "lr": 5e-6,
    "warmup": 500,
    "batch_size": 1,
    "gan_weight": 0.001,
    "disc_weight": 0.01,
    "a": 0.75,
    "guidance": 7.5,
    "fake_updates": 10,
    "cycles": 5000,
    "ema": 0.0,
    "hflip": False,
    "precision": "auto",
}

# What the public few-shot code has where it differs from the paper's text; docs/fsig.md says what is still different.
_PUBLIC_CODE: dict[str, Any] = {
    "grid": "edm",
    "denoising": "edm",
    "timestep_law": "karras",
    "gan_aggregation": "mean_logit",
    "gan_weight": 0.015,
    "disc_weight": 0.05,
}

# What makes a run a DMD2 distillation of the source, whatever the preset: the source teacher alone and a single head.
DISTILL: dict[str, Any] = {
    "student_init": "source",
    "target_teacher": "off",
    "a": 0.0,
    "heads": "single",
    "augment": "none",
    "target_warmup": 0,
    "target_cycles": 0,
    "target_epochs": 0,
    "recombine": 0,
    "transfer": 0.0,
}

# The same for the second stage of adapt-then-distill.
TWO_STAGE: dict[str, Any] = {"heads": "single"}

# The paper's rivals (METHOD §9) on the same model, pictures and student to start from.
_RIVALS: dict[str, dict[str, Any]] = {
    "avatars-finetune": {
        "source": "bundled:avatars",
        "method": "finetune",
        "recombine": 2000,
        "denoising": "v",
        "denoising_law": "detail",
        "cutmix_above": 0.5,
        "hflip_check": True,
        "batch_size": 8,
        "target_epochs": 480,
        "lr": 1.6e-3,
        "lr_decay": "cosine",
        "beta2": 0.99,
        "warmup": 20,
        "ema": 0.99,
        "cycles": 4800,
    },
    "avatars-distill": _AVATARS | DISTILL | {"anchor_batch": 32, "cycles": 3000, "hflip": False},
    "avatars-adapt-then-distill": _AVATARS | _LONG | TWO_STAGE | {"method": "adapt-then-distill", "a": 1.0},
    "avatars-distill-then-adapt": {
        "source": "bundled:avatars",
        "student_init": "bundled:avatars-3step",
        "grid": "fine",
        "method": "distill-then-adapt",
        "recombine": 2000,
        "denoising": "v",
        "denoising_law": "quadratic",
        "hflip_check": True,
        "batch_size": 8,
        "lr": 1e-4,
        "lr_decay": "cosine",
        "warmup": 20,
        "ema": 0.99,
        "cycles": 600,
    },
}

PRESETS: dict[str, dict[str, Any]] = {
    **_RIVALS,
    "avatars": _AVATARS | _LONG | {"sample_every": 100, "save_every": 200},
    "avatars-demo": _AVATARS | _DEMO | {"cycles": 950, "sample_every": 25, "save_every": 100, "max_minutes": 9.0},
    "fsig-near": _FSIG | {"a": 0.25},
    "fsig-far": _FSIG | {"a": 0.75},
    "fsig-near-paper": _FSIG | _PUBLIC_CODE | {"a": 0.25},
    "fsig-far-paper": _FSIG | _PUBLIC_CODE | {"a": 0.75},
    "sdp": _SDP,
}

SUMMARIES: dict[str, str] = {  # of those that `unidad train` is for; the rivals' are chosen by their command or --method
    "avatars": "the bundled 32x32 model in 4 steps, an hour on 2 CPU cores",
    "avatars-demo": "the same in 3 steps, stopped within ten minutes (`make demo`)",
    "fsig-near": "the paper's few-shot track, target near the source (babies, sunglasses); needs a GPU",
    "fsig-far": "the same for far targets (metfaces, cats)",
    "fsig-near-paper": "fsig-near with the public research code's grid, weights and teachers' noise",
    "fsig-far-paper": "fsig-far likewise",
    "sdp": "a subject from a few photos and a Stable Diffusion source (docs/sdp.md); needs a GPU",
}
