"""Features made by several processes, each of other batches; which batches there are is what it is in one process, and so are the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from unidad.distributed import Ranks
from unidad.metrics.features import Extractor, cache_key, is_kept


class Remembered:
    """Stands for an extractor where the features it will be asked for are known already, by content.

    Attributes:
        known: `cache_key` of pixels -> their features.
    """

    def __init__(self, extractor: Extractor):
        self.name, self.digest, self.resize = extractor.name, extractor.digest, extractor.resize
        self.batch_size, self.known = extractor.batch_size, dict[str, Tensor]()

    def __call__(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] uint8 -> [N, D] float32. Raises KeyError for pixels that were not foreseen."""
        return self.known[cache_key(self, pixels)]


def share_features(extractor: Extractor, sets: Sequence[tuple[Tensor, str | Path | None]], ranks: Ranks) -> Extractor:
    """The same extractor, once all processes, who must all ask, have made its features of some sets of pictures together.

    Args:
        sets: pixels [N, 3, H, W] uint8 and the folder where `features_of` will look for their features. Those that the first process
            finds there are left to it.

    Raises:
        LostProcessError: if another process has ended.
    """
    if ranks.count == 1:
        return extractor
    found = Remembered(extractor)
    for pixels, cache_dir in sets:
        kept = cache_dir is not None and is_kept(extractor, pixels, cache_dir)
        if not any(ranks.total([ranks.first and kept])):
            found.known[cache_key(extractor, pixels)] = _together(extractor, pixels, ranks)
    return found


def _together(extractor: Extractor, pixels: Tensor, ranks: Ranks) -> Tensor:
    batches = list(pixels.split(extractor.batch_size))
    mine = {i: extractor(batches[i]) for i in range(ranks.rank, len(batches), ranks.count)}
    # The first process has a batch at least, and says how many features there are.
    width = int(ranks.total([float(mine[0].shape[1]) if ranks.first else 0.0])[0])
    whole = torch.zeros(len(pixels), width)
    for i, rows in mine.items():
        whole[i * extractor.batch_size :][: len(rows)] = rows
    return ranks.filled(whole)
