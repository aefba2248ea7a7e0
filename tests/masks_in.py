"""The masks of an archive that the demo offers."""

import zipfile
from pathlib import Path

import numpy as np
from PIL import Image


def masks_in(archive: str | Path) -> np.ndarray:
    """(K, T, height, width) bool."""
    with zipfile.ZipFile(archive) as opened:
        masks = {}
        for name in sorted(opened.namelist()):
            with opened.open(name) as file:
                masks[name] = np.asarray(Image.open(file))
    objects = sorted({name.split("/")[0] for name in masks}, key=int)
    return np.stack([np.stack([mask for name, mask in masks.items() if name.startswith(f"{one}/")]) for one in objects])
