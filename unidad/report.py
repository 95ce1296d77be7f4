"""The page a run ends with: report.html, self-contained (pictures inline, curves as SVG), and grid.png."""

from __future__ import annotations

import base64
import html
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from unidad.backbones.base import Backbone
from unidad.data import PictureSet, picture_grid
from unidad.metrics.distances import intra_diversity
from unidad.metrics.features import EfficientNetLite0
from unidad.run import RunFolder, public_name, replacing
from unidad.sample import draw

SHOWN = 48
SCORED = 128
DDIM_STEPS = 50
CURVES = ("dmd", "gan", "anchor", "disc", "disc_accuracy", "fake", "target")


def write_report(
    run: RunFolder,
    pictures: PictureSet,
    product: Backbone,
    source: Backbone,
    steps: list[int] | None,
    label: int | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    scored: int = SCORED,
    shown: int = SHOWN,
    batch_size: int | None = None,
) -> Path:
    """Draw from product and source, score the product, and write grid.png and report.html; returns the page's path.

    Args:
        product: the student, or, where `steps` is None, a many-step model.
        label, decode, batch_size: as for `draw`.
        scored, shown: samples of the product that are scored, and of both that are shown.
    """
    name = "fine-tuned model" if steps is None else "student"
    began = time.perf_counter()
    samples = draw(product, scored, 0, steps, DDIM_STEPS, batch_size, label, decode)
    product_seconds = (time.perf_counter() - began) / scored
    began = time.perf_counter()
    source_samples = draw(source, shown, 0, None, DDIM_STEPS, batch_size, label, decode)
    source_seconds = (time.perf_counter() - began) / shown
    k = DDIM_STEPS if steps is None else len(steps)
    sheet = side_by_side(pictures.pixels, source_samples, samples[:shown], f"{name}, {k} step{'s' if k > 1 else ''}")
    with replacing(run.path / "grid.png") as part:
        sheet.save(part, format="PNG")
    scores = {
        f"seconds a picture, {name}": round(product_seconds, 4),
        f"seconds a picture, source at {DDIM_STEPS} DDIM steps": round(source_seconds, 4),
        f"{name} faster by": f"{source_seconds / product_seconds:.1f}x",
    }
    scores |= closeness(samples, pictures.pixels[:scored])
    page = run.path / "report.html"
    with replacing(page) as part:
        part.write_text(_page(run, pictures, sheet, scores), encoding="utf-8")
    return page


def closeness(samples: Tensor, pictures: Tensor) -> dict[str, Any]:
    """Scores that need no held-out pictures: variety inside clusters, and distance to the nearest training picture.

    Args:
        samples, pictures: [N, 3, H, W] uint8.
    """
    extractor = EfficientNetLite0()
    fake, real = extractor(samples), extractor(pictures)
    nearest = torch.cdist(fake, real).min(dim=1).values
    scores: dict[str, Any] = {"features": extractor.name, "samples scored": len(samples)}
    scores["distance to nearest training picture, median"] = round(float(nearest.median()), 3)
    if len(pictures) > 1:
        between = torch.cdist(real, real).fill_diagonal_(float("inf")).min(dim=1).values
        scores["the same between training pictures, median"] = round(float(between.median()), 3)
    scores["variety (intra diversity in these features)"] = round(intra_diversity(fake, real).value, 3)
    return scores


def side_by_side(targets: Tensor, source: Tensor, drawn: Tensor, caption: str) -> Image.Image:
    """Three captioned blocks: target pictures, source samples, the product's samples. All [N, 3, H, W] uint8."""
    scale = max(1, 96 // targets.shape[-1])
    blocks = [
        (f"target: {len(targets)} pictures", picture_grid(targets[:20], 5, scale)),
        ("source model", picture_grid(source[:20], 5, scale)),
        (caption, picture_grid(drawn[:40], 10, scale)),
    ]
    gap, head = 24, 26
    width = sum(block.width for _, block in blocks) + gap * (len(blocks) + 1)
    sheet = Image.new("RGB", (width, max(block.height for _, block in blocks) + head + 2 * gap), "white")
    ink, x = ImageDraw.Draw(sheet), gap
    for title, block in blocks:
        ink.text((x, gap - 4), title, fill="black", font_size=18)
        sheet.paste(block, (x, head + gap))
        x += block.width + gap
    return sheet


def _inline(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows of log.jsonl that are whole."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            rows.append(row | {"cycle": int(row["cycle"]), "seconds": float(row["seconds"]), "losses": dict(row["losses"])})
        except (ValueError, KeyError, TypeError, RecursionError):
            break
    return rows


def curve(title: str, points: list[tuple[float, float]], width: int = 340, height: int = 150) -> str:
    """One SVG line: `points` are (cycle, value), drawn from their least to their greatest value."""
    if len(points) < 2:
        return ""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    low, high = min(ys), max(ys)
    span = (high - low) or 1.0
    left, top, w, h = 46, 22, width - 56, height - 44
    path = " ".join(
        f"{left + w * (x - xs[0]) / ((xs[-1] - xs[0]) or 1):.1f},{top + h * (1 - (y - low) / span):.1f}" for x, y in points
    )
    text = 'font-size="11" fill="#555"'
    return (
        f'<svg width="{width}" height="{height}" role="img"><text x="{left}" y="14" font-size="13">{html.escape(title)}</text>'
        f'<rect x="{left}" y="{top}" width="{w}" height="{h}" fill="none" stroke="#ddd"/>'
        f'<polyline points="{path}" fill="none" stroke="#2563eb" stroke-width="1.5"/>'
        f'<text x="2" y="{top + 10}" {text}>{high:.3g}</text><text x="2" y="{top + h}" {text}>{low:.3g}</text>'
        f'<text x="{left}" y="{height - 6}" {text}>{xs[0]:g}</text>'
        f'<text x="{left + w}" y="{height - 6}" {text} text-anchor="end">cycle {xs[-1]:g}</text></svg>'
    )


def _curves(rows: list[dict[str, Any]]) -> str:
    names = dict.fromkeys(name for row in rows for name in row["losses"] if name.split("/")[1] in CURVES)
    return "".join(curve(name, [(row["cycle"], row["losses"][name]) for row in rows if name in row["losses"]]) for name in names)


def _public(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings for whoever is shown the report: folders by their own names, without the path on this machine."""
    return {k: public_name(v) if isinstance(v, str) and Path(v).is_absolute() else v for k, v in settings.items()}


def _table(facts: dict[str, Any]) -> str:
    cells = "".join(f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(str(v))}</td></tr>" for k, v in facts.items())
    return f"<table>{cells}</table>"


def peak_memory() -> str:
    """The most memory this process has held, as text; "unknown" where the system does not tell."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB of GPU memory"
    try:
        import resource
    except ImportError:  # Windows
        return "unknown"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB"


def _over_time(run: RunFolder) -> str:
    grids = sorted(run.samples.glob("*.png")) if run.samples.is_dir() else []
    if len(grids) > 6:
        grids = [grids[round(i * (len(grids) - 1) / 5)] for i in range(6)]
    figures = []
    for path in grids:
        with Image.open(path) as image:
            cycle = f"cycle {int(path.stem)}"
            figures.append(f'<figure><img src="{_inline(image)}" alt="samples, {cycle}"><figcaption>{cycle}</figcaption></figure>')
    return "".join(figures)


def _made_of_them(more: Tensor) -> str:
    sheet = _inline(picture_grid(more[:100], 20, max(1, 48 // more.shape[-1])))
    return f'<h2>Made of their colours and parts: {len(more)} more, the first of them</h2><img src="{sheet}" alt="contact sheet">'


_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#111}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}img{max-width:100%;image-rendering:pixelated}
figure{display:inline-block;margin:.4em;max-width:46%}figcaption{color:#555;font-size:.85em}
table{border-collapse:collapse;font-size:.85em}th{text-align:left;font-weight:500;padding:.1em 1.2em .1em 0;vertical-align:top}
.columns{columns:3 260px}.wide{overflow-x:auto}"""


def _page(run: RunFolder, pictures: PictureSet, sheet: Image.Image, scores: dict[str, Any]) -> str:
    facts, rows = run.read(), read_log(run.log)
    data, notes = facts["data"], facts["data"].get("notes", [])
    steps = facts["student_steps"]
    made = f"a {len(steps)}-step generator" if steps else "a fine-tuned many-step model"
    timing: dict[str, Any] = {"cycles": rows[-1]["cycle"] if rows else 0}
    if rows:
        timing["training time"] = f"{rows[-1]['seconds'] / 60:.1f} minutes"
        timing["seconds a cycle"] = round(rows[-1]["seconds"] / max(1, rows[-1]["cycle"]), 3)
        timing["updates skipped as not finite"] = rows[-1].get("skipped", 0)
    contact = picture_grid(pictures.pixels[:100], 10, max(1, 64 // pictures.size))
    timing["peak memory"] = peak_memory()
    surroundings = facts["surroundings"]
    machine = {"device": surroundings["device"], "commit": surroundings["commit"]} | surroundings["versions"]
    more = "" if pictures.more is None else _made_of_them(pictures.more)
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>unidad: {html.escape(data["target"])}</title>
<style>{_STYLE}</style>
<h1>{html.escape(data["target"])}: {data["count"]} pictures to {made}</h1>
<div class="wide"><img src="{_inline(sheet)}" alt="target pictures, source samples, samples of what was made"></div>
<h2>Scores and timing</h2>{_table(scores | timing)}
<h2>Over time</h2>{_over_time(run)}
<h2>Losses</h2>{_curves(rows)}
<h2>The pictures it learnt from</h2><img src="{_inline(contact)}" alt="contact sheet">
<p>{html.escape(" ".join(notes))}</p>
{more}<h2>Settings</h2><div class="columns">{_table(_public(facts["settings"]))}</div>
<h2>Made with</h2>{_table(machine | {"hash of " + k: v for k, v in facts["hashes"].items()})}
</html>
"""
