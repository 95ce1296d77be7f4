"""Statistics files (.npz): the mean and covariance of a reference set's features, as pytorch-fid and the public Uni-DAD code write them."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unidad.errors import DataError
from unidad.metrics.distances import frechet_distance_from_moments


@dataclass(frozen=True)
class Statistics:
    """Mean [D] and covariance [D, D] of features, float64; `features` [M, D] where the file keeps them (the public code's `act`)."""

    mean: Tensor
    covariance: Tensor
    features: Tensor | None = None

    def frechet_distance(self, fake: Tensor) -> float:
        """To features [N, D] of the same extractor; the file cannot say which one made it.

        Raises:
            DataError: if D is another one.
        """
        if fake.shape[1] != len(self.mean):
            raise DataError(
                f"The statistics file holds {len(self.mean)} features a picture, the extractor makes {fake.shape[1]}: "
                "published files need --extractor inception-fid."
            )
        x = fake.double()
        return frechet_distance_from_moments(self.mean, self.covariance, x.mean(dim=0), torch.cov(x.T))


def load_statistics(path: str | Path) -> Statistics:
    """Read `mu`, `sigma` and, if it is there, `act` from a .npz file; nothing in it is unpickled.

    Raises:
        DataError: if the file is missing, damaged, or does not hold them in shapes that fit.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: torch.from_numpy(file[key].astype(np.float64)) for key in ("mu", "sigma", "act") if key in file}
    except FileNotFoundError:
        raise DataError(f"There is no statistics file '{path}'. Give a .npz file or a folder of pictures.") from None
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"The statistics file '{path}' cannot be read: no whole .npz file of numbers ({type(error).__name__}). Get it anew, or give the folder of "
            "pictures."
        ) from None
    mean, covariance, features = (arrays.get(key) for key in ("mu", "sigma", "act"))
    if mean is None or covariance is None or mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise DataError(
            f"'{path}' does not hold a mean 'mu' [D] and a covariance 'sigma' [D, D]. Give the folder of pictures instead."
        )
    if features is not None and (features.ndim != 2 or len(features) < 2 or features.shape[1] != len(mean)):
        raise DataError(
            f"'{path}' holds features 'act' of shape {list(features.shape)}, not [M, {len(mean)}]. Give the folder instead."
        )
    if not all(bool(torch.isfinite(array).all()) for array in arrays.values()):
        raise DataError(f"'{path}' holds numbers that are not finite. Get it anew, or give the folder of pictures.")
    return Statistics(mean, covariance, features)
