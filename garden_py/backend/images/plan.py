"""What a manifest and its config ask for. Pure; both may say anything.

Source: OCI image-spec manifest.md, config.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from garden_py.model.errors import ImageInvalid
from garden_py.model.image import is_digest

LAYERS_MAX = 400  # overlayfs takes 500 lower directories (OVL_MAX_STACK)
_SIZE_MAX = 1 << 53  # what JSON numbers are good for


@dataclass(frozen=True, slots=True)
class PlannedLayer:
    """One layer as the manifest has it, and what it shall come to."""

    digest: str
    size: int
    media_type: str
    diff_id: str

    def job(self, target: Path) -> dict[str, Any]:
        """For the puller."""
        return {
            "digest": self.digest,
            "size": self.size,
            "media_type": self.media_type,
            "diff_id": self.diff_id,
            "target": str(target),
        }


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """What a manifest and its config ask for."""

    id: str
    layers: tuple[PlannedLayer, ...]

    @property
    def diff_ids(self) -> tuple[str, ...]:
        """Of all layers, lowest first."""
        return tuple(layer.diff_id for layer in self.layers)

    def distinct(self) -> list[tuple[int, PlannedLayer]]:
        """Each layer once: an empty one is often there several times."""
        first = {layer.diff_id: number for number, layer in reversed(list(enumerate(self.layers)))}
        return [(number, self.layers[number]) for number in sorted(first.values())]


def plan_of(image: str, told: dict[str, Any]) -> ImagePlan:
    """What is to be fetched, by a manifest and a config that anybody may have written.

    Raises:
        ImageInvalid: they are not a manifest and a config, or do not go together.
    """
    try:
        manifest, config = told["manifest"], told["config"]
        image_id = manifest["config"]["digest"]
        blobs, diff_ids = manifest["layers"], config["rootfs"]["diff_ids"]
        layers = tuple(
            PlannedLayer(blob["digest"], blob["size"], str(blob.get("mediaType", "")), diff_id)
            for blob, diff_id in zip(blobs, diff_ids, strict=True)
        )
        well_formed = all(isinstance(layer.size, int) and 0 <= layer.size <= _SIZE_MAX for layer in layers)
        digests = [image_id, *(layer.digest for layer in layers), *(layer.diff_id for layer in layers)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ImageInvalid(image, f"its manifest and its config do not describe layers: {error!r}") from error
    if not well_formed or not all(isinstance(each, str) and is_digest(each) for each in digests):
        raise ImageInvalid(image, "a layer without a size and sha256 digests")
    if not 0 < len(layers) <= LAYERS_MAX:
        raise ImageInvalid(image, f"it has {len(layers)} layers; 1 to {LAYERS_MAX} are possible")
    return ImagePlan(image_id, layers)
