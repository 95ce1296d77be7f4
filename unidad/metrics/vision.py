"""DINO, DINOv2 and CLIP features through transformers (extra `metrics`), from a local folder, or a hub id that the cache holds."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unidad.errors import ModelError, SettingsError
from unidad.metrics.features import at_a_time, in_batches, resized


@dataclass(frozen=True)
class Family:
    """What a kind of model is fed: mean and deviation are of pixels in 0..1; `side` None means the size in its configuration."""

    hub_id: str
    model_type: str  # as its configuration has it
    side: int | None
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FAMILIES = {
    "dino": Family("facebook/dino-vits16", "vit", None, *IMAGENET),
    "dinov2": Family("facebook/dinov2-base", "dinov2", 224, *IMAGENET),
    "clip": Family(
        "openai/clip-vit-base-patch32",
        "clip",
        None,
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    ),
}


class VisionFeatures:
    """The class token of DINO or DINOv2 after its last norm, or the image embedding of CLIP, none scaled to length 1.

    Pictures are resized whole, bicubic and antialiased, without a centre crop, to the model's own size (DINOv2: to 224 pixels).

    Args:
        family: "dino" (the first one, arXiv 2104.14294: a plain ViT, whose pooler, which it never had, is left out), "dinov2" or "clip".
        source: a folder saved by transformers, or a hub id.
        download: fetch a hub id that the local cache does not hold.
        batch_size: pictures at a time; `at_a_time` unless given.
        device: where the network runs.

    Raises:
        SettingsError: if transformers is not installed.
        ModelError: if there is no such model here, it is of another kind, or lacks weights.
    """

    def __init__(
        self,
        family: str,
        source: str | Path | None = None,
        download: bool = False,
        batch_size: int | None = None,
        device: torch.device | str = "cpu",
    ):
        self._kind, self._family = family, FAMILIES[family]
        source = str(source or self._family.hub_id)
        self._source, self._local = source, {"local_files_only": Path(source).is_dir() or not download}
        self.batch_size, self.device = batch_size or at_a_time(device), torch.device(device)
        network = _load(family, source, download)
        self._network = network.eval().requires_grad_(False).to(self.device)
        self._side = self._family.side or int(getattr(network.config, "vision_config", network.config).image_size)
        self.name = f"{family}:{Path(source).name}"
        self.resize = f"bicubic to {self._side}x{self._side}, antialiased"
        self.digest = state_digest(self._network)

    def __call__(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] uint8 -> [N, D] float32 on the CPU. Raises DataError for anything else."""
        return in_batches(self._features, pixels, self.batch_size)

    def texts(self, prompts: list[str]) -> Tensor:
        """CLIP's text embeddings, [P, D] float32 on the CPU, in the space of its image embeddings.

        Raises:
            ModelError: no tokenizer lies beside the model.
            SettingsError: a prompt is longer than the model takes.
        """
        from transformers import CLIPTokenizer

        try:
            tokenizer = CLIPTokenizer.from_pretrained(self._source, **self._local)
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(
                f"'{self._source}' has no readable tokenizer ({' '.join(str(error).split())[:120]}). CLIP-T needs vocab.json and "
                "merges.txt, or tokenizer.json, beside the model."
            ) from None
        most = int(self._network.config.text_config.max_position_embeddings)
        for prompt, ids in zip(prompts, tokenizer(prompts).input_ids, strict=True):
            if len(ids) > most:
                raise SettingsError(f"The prompt '{prompt[:60]}...' has {len(ids)} tokens, CLIP takes {most}. Shorten it.")
        tokens = tokenizer(prompts, padding="max_length", max_length=most, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            pooled = self._network.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
            return self._network.text_projection(pooled).float().cpu().clone()

    def _features(self, pixels: Tensor) -> Tensor:
        mean, deviation = (
            torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (self._family.mean, self._family.deviation)
        )
        x = resized(pixels.to(self.device), self._side, self._side) / 255
        x = (x - mean) / deviation
        if self._kind == "clip":
            return self._network.visual_projection(self._network.vision_model(pixel_values=x).pooler_output)
        return self._network(pixel_values=x).last_hidden_state[:, 0]


def dino_family(source: str | Path | None, download: bool = False) -> str:
    """Which of "dino" and "dinov2" a model is of; "dino", the paper's, where none is given.

    Raises:
        SettingsError, ModelError: as `VisionFeatures` does.
    """
    if source is None:
        return "dino"
    kind = _model_type(str(source), download)
    return "dinov2" if kind == FAMILIES["dinov2"].model_type else "dino"


def _model_type(source: str, download: bool) -> str:
    try:
        import transformers
    except ImportError:
        raise SettingsError("These features need transformers: pip install 'unidad[metrics]'.") from None
    try:
        return str(
            transformers.AutoConfig.from_pretrained(source, local_files_only=Path(source).is_dir() or not download).model_type
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise _unloadable(source, error, download) from None


def _unloadable(source: str, error: Exception, download: bool) -> ModelError:
    if download or Path(source).is_dir():
        cause = f"cannot be loaded here: {' '.join(str(error).split())[:200]}"
    else:
        cause = "is no folder, and not in the local cache of downloaded models."
    return ModelError(
        f"'{source}' {cause} Give a folder saved by transformers with "
        "--weights FOLDER (--track sdp: --dino or --clip FOLDER), or let --download fetch a hub id."
    )


def _load(family: str, source: str, download: bool) -> Any:
    kind, wanted = _model_type(source, download), FAMILIES[family].model_type
    if kind != wanted:
        raise ModelError(f"'{source}' is a '{kind}' model, and {family} is a '{wanted}'. Give another model or --extractor.")
    import transformers

    options: dict[str, Any] = {"local_files_only": Path(source).is_dir() or not download, "output_loading_info": True}
    options |= {"add_pooling_layer": False} if family == "dino" else {}
    try:
        network, report = transformers.AutoModel.from_pretrained(source, dtype=torch.float32, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise _unloadable(source, error, download) from None
    if report["missing_keys"]:
        raise ModelError(f"'{source}' lacks weights, among them '{min(report['missing_keys'])}'. Get the model anew.")
    return network


def state_digest(network: nn.Module) -> str:
    """sha256 over the names and numbers of all weights, whatever files they came in."""
    content = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        content.update(f"{name}\0{list(value.shape)}\0".encode())
        content.update(value.detach().cpu().float().contiguous().numpy().data)
    return content.hexdigest()
