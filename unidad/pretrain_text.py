"""Pretraining a text-to-image model on captioned pictures: `unidad pretrain --set init=FOLDER`, a metadata.jsonl beside the pictures."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unidad.backbones.load_text import TextModel, decode_latents, encode_pictures, encode_prompts, load_vae, picture_side
from unidad.backbones.unet2d_cond import UNet2DCondBackbone
from unidad.captions import METADATA, read_captions
from unidad.config import PretrainSettings
from unidad.data import LatentStream, load_folder, to_signed
from unidad.errors import DataError, SettingsError
from unidad.export_text import save_text_source
from unidad.sample import draw

UNTOLD = 0.1  # the share of pictures that are learnt under the empty prompt, which guidance needs
SHOWN, EACH = 6, 4  # captions in a sample grid, pictures of each


class CaptionedStream(LatentStream):
    """A `LatentStream` in which a tenth of the pictures, other ones each time, have the empty prompt, `untold`, as their caption."""

    untold: int

    def batch(self, n: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As `PictureStream.batch`; which captions are left out depends on the seed and on how many pictures were drawn alone."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.drawn + 1) % 2**63)
        latents, labels, masks = super().batch(n)
        assert labels is not None
        left_out = (torch.rand(n, generator=generator) < UNTOLD).to(labels.device)
        return latents, labels.masked_fill(left_out, self.untold), masks


class Captioned:
    """What `unidad pretrain` needs of a text-to-image model and a folder of captioned pictures.

    The model's table becomes that of the captions, each once, and the empty prompt.

    Attributes:
        stream: of the pictures' latents.
        digest: sha256 of pictures and captions.
        count: of the pictures.

    Raises:
        UserError: a setting does not fit, or pictures or captions are missing or damaged.
    """

    def __init__(self, model: TextModel, folder: Path, settings: PretrainSettings, device: torch.device):
        if settings.compile:
            raise SettingsError("'compile' is not there yet for text-to-image models. Leave it off.")
        pictures = load_folder(folder, picture_side(model.folder))
        captions = read_captions(folder, pictures.names)
        if captions is None:
            raise DataError(
                f"'{model.name}' learns from captions: '{folder}' needs a {METADATA}, or a text file beside each picture."
            )
        self.model, self.count = model, len(pictures)
        self.digest = hashlib.sha256("\n".join([pictures.digest, *captions]).encode()).hexdigest()
        texts = list(dict.fromkeys(captions))
        rows = {text: row for row, text in enumerate(texts)}
        assert isinstance(model.backbone, UNet2DCondBackbone)
        model.backbone.set_prompts(encode_prompts(model.folder, [*texts, ""]))
        vae, signed = load_vae(model.folder).to(device), to_signed(pictures.pixels).to(device)
        latents = encode_pictures(vae, signed)
        mirrored = encode_pictures(vae, signed.flip(-1)) if settings.hflip else latents
        labels = torch.tensor([rows[caption] for caption in captions])
        self.stream = CaptionedStream(latents, mirrored, labels, hflip=settings.hflip, seed=settings.seed, device=device)
        self.stream.untold = len(texts)

    def draw(self, product: nn.Module) -> Tensor:
        """Of each of the first captions a row, the same seeds, [N, 3, S, S] uint8."""
        assert isinstance(product, UNet2DCondBackbone)
        decode = partial(decode_latents, load_vae(self.model.folder).to(next(product.parameters()).device))
        told = range(min(SHOWN, self.stream.untold))
        return torch.cat([draw(product, EACH, label=row, decode=decode) for row in told])

    def save(self, product: nn.Module, out: Path, facts: dict[str, Any]) -> None:
        """Write a stock folder."""
        assert isinstance(product, UNet2DCondBackbone)
        save_text_source(product, self.model.scheduler, self.model.folder, out, facts)
