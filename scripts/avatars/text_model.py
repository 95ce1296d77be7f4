"""Writes a tiny Stable Diffusion folder for `unidad pretrain --set init=`: every word of the captions a token, pictures as their own latents.

    python text_model.py CAPTIONED_FOLDER MODEL_FOLDER

UNet and text encoder have random weights; only the former is trained afterwards. The VAE is the identity, to a hundredth of a grey level.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SIDE, TOKENS, WIDTH = 32, 32, 64  # of pictures; the longest prompt, its two ends included; of an encoded token
START, END, LAST = "<|startoftext|>", "<|endoftext|>", "</w>"
LARGE, LINEAR = 100.0, 20.0  # see `identity`


def merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges after which each word is one token."""
    pieces, found = [[*word[:-1], word[-1] + LAST] for word in words], []
    while any(len(word) > 1 for word in pieces):
        pair = Counter(pair for word in pieces for pair in pairwise(word)).most_common(1)[0][0]
        found.append(pair)
        pieces = [merged(word, pair) for word in pieces]
    return found


def merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    """A word in pieces, with that pair joined wherever it stands."""
    out: list[str] = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def tokenizer(words: list[str], folder: Path) -> CLIPTokenizer:
    """A tokenizer that knows those words whole and all others in letters."""
    letters, joined = [chr(i) for i in range(33, 127)], merges(words)
    vocabulary = dict.fromkeys([*letters, *(letter + LAST for letter in letters), *map("".join, joined), START, END])
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, joined)]) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def identity() -> AutoencoderKL:
    """A VAE whose latents are the pictures.

    Its last normalisation and activation are made harmless: pictures stand beside their negatives, so that the mean is 0, and beside two
    channels of +-LARGE, which set the variance; the activation works at LINEAR, where it is x -> x.
    """
    vae = AutoencoderKL(block_out_channels=(8,), layers_per_block=1, latent_channels=3, norm_num_groups=1, sample_size=SIDE,
                        mid_block_add_attention=False, scaling_factor=1.0)  # fmt: skip
    for parameter in vae.parameters():
        nn.init.zeros_(parameter)
    eye = torch.eye(3)
    with torch.no_grad():
        for part in (vae.encoder, vae.decoder):
            part.conv_in.weight[:6, :, 1, 1] = torch.cat([eye, -eye])
            part.conv_in.bias[6:] = torch.tensor([LARGE, -LARGE])
            part.conv_norm_out.weight.fill_(LARGE / 2)  # of 8 channels two are LARGE
            part.conv_norm_out.bias.fill_(LINEAR)
            part.conv_out.weight[:3, :3, 1, 1] = eye
            part.conv_out.bias[:3] = -LINEAR
        vae.quant_conv.weight[:, :, 0, 0] = torch.eye(6)
        vae.encoder.conv_out.bias[3:] = -30.0  # the logarithm of its variance
        vae.post_quant_conv.weight[:, :, 0, 0] = eye
    return vae.eval()


def unet(widths: tuple[int, int, int] = (24, 48, 64)) -> UNet2DConditionModel:
    """Small enough for ten minutes on a CPU."""
    return UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=3,
        out_channels=3,
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )


def write(captioned: Path, out: Path, seed: int = 0) -> None:
    """Write the folder."""
    lines = (captioned / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    words = sorted({word for line in lines for word in json.loads(line)["text"].replace(",", " , ").split()})
    known = tokenizer(words, out / "tokenizer")
    torch.manual_seed(seed)
    text = CLIPTextConfig(
        vocab_size=len(known),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=known.bos_token_id,
        eos_token_id=known.eos_token_id,
    )
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
        steps_offset=1,
    )
    parts = {"vae": identity(), "unet": unet(), "text_encoder": CLIPTextModel(text), "tokenizer": known, "scheduler": scheduler}
    pipe = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.save_pretrained(out, safe_serialization=True)
    print(f"{out}: {len(words)} words, UNet of {sum(p.numel() for p in pipe.unet.parameters()) / 1e6:.2f} M parameters")


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
