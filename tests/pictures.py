"""What a picture shows, as far as plain arithmetic can tell."""

from __future__ import annotations

import numpy as np
from PIL import Image


def load(path) -> np.ndarray:
    """RGB in 0..255, float [h w 3]."""
    return np.asarray(Image.open(path).convert("RGB"), dtype=float)


def background(picture: np.ndarray) -> np.ndarray:
    """The median colour of the four corners (an eighth of the side each), [3]."""
    n = picture.shape[0] // 8
    corners = [picture[:n, :n], picture[:n, -n:], picture[-n:, :n], picture[-n:, -n:]]
    return np.median(np.concatenate([corner.reshape(-1, 3) for corner in corners]), axis=0)


def centre(picture: np.ndarray) -> np.ndarray:
    """The mean colour of the middle half of the picture, [3]."""
    n = picture.shape[0] // 4
    return picture[n:-n, n:-n].reshape(-1, 3).mean(axis=0)
