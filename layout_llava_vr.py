"""How vision tokens are arranged: regions and windows within a tile, tiles within an image.

One class a layout. The number of vision tokens of an image is the length of what its layout packs, so the model, which
packs, and the processor, which writes placeholders, cannot disagree.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BaseImageProcessor, select_best_resolution


def tokens_per_side(grid_size: int, downsample: int) -> int:
    """Vision tokens per side of a tile with `grid_size` patches a side; a region that is not full counts."""
    return -(-grid_size // downsample)


def window_size(downsample: int, ratio: float) -> int:
    """Patches per side of a token's window: `ratio` times its region's, rounded up so that it is centred."""
    return downsample + 2 * math.ceil(round(downsample * (ratio - 1) / 2, 6))


def cut_windows(grid: torch.Tensor, downsample: int, window: int) -> torch.Tensor:
    """
    Cuts a grid of features into one window for each region of `downsample` patches a side, row by row.

    Windows are centred on their regions and overlap where they are larger. What lies beyond the grid is zero.

    Args:
        grid: `(tiles, grid_size, grid_size, features)`.
        window: patches per side of a window: `downsample` plus an even number, or 0.

    Returns:
        `(tiles, regions, window * window, features)`.
    """
    grid_size = grid.shape[1]
    tokens, before = tokens_per_side(grid_size, downsample), (window - downsample) // 2
    after = (tokens - 1) * downsample + window - before - grid_size
    if before or after:
        grid = F.pad(grid, (0, 0, before, after, before, after))
    steps = torch.arange(tokens, device=grid.device)[:, None] * downsample
    steps = steps + torch.arange(window, device=grid.device)  # (t, window)
    positions = steps[:, None, :, None] * grid.shape[2] + steps[:, None, :]  # (t, t, window, window), of the flat grid
    # Not Tensor.unfold: its compiled backward pass corrupts memory on CPU (torch 2.13), and index_select is faster.
    windows = grid.flatten(1, 2).index_select(1, positions.flatten())
    return windows.unflatten(1, (tokens**2, window**2))


def to_grid(features: torch.Tensor) -> torch.Tensor:
    """`(tiles, side * side, features)` to `(tiles, side, side, features)`."""
    side = int(features.shape[1] ** 0.5)  # not math.isqrt, which cannot be traced
    return features.unflatten(1, (side, side))


@dataclass(frozen=True)
class ImageLayout:
    """Tiles follow each other whole, the base tile first ("flat"). Without pinpoints it is the image's only one.

    Args:
        tile_size: pixels per side of a tile, the vision tower's input.
        grid_size: patches per side of a tile.
        pinpoints: the tilings to choose from, as (height, width) in pixels.
        max_tiles: past this many tiles' worth of tokens the merged grid is resampled (LLaVA-OneVision); None for never.
    """

    tile_size: int
    grid_size: int
    pinpoints: tuple[tuple[int, int], ...] = ()
    max_tiles: int | None = None

    def process(self, images: list[np.ndarray], image_processor: BaseImageProcessor, **kwargs) -> BatchFeature:
        """The `pixel_values` of RGB images `(3, height, width)` of 0 to 255."""
        return image_processor(images, **kwargs)

    def pinpoint(self, image_size: Sequence[int]) -> tuple[int, int]:
        """The one of the pinpoints that suits an image of (height, width) pixels."""
        return select_best_resolution(tuple(image_size), self.pinpoints)

    def tiling(self, image_size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of tiles beside the base tile, for an image of (height, width) pixels."""
        height, width = self.pinpoint(image_size)
        return height // self.tile_size, width // self.tile_size

    def num_tiles(self, image_size: Sequence[int]) -> int:
        """Tiles of an image, the base tile included."""
        return 1 + math.prod(self.tiling(image_size)) if self.pinpoints else 1

    def fit(self, image_size: Sequence[int], room: Sequence[int]) -> tuple[int, int]:
        """The (height, width) to which an image is resized to fill `room` without distortion (LLaVA-NeXT's rule)."""
        scale = min(most / side for side, most in zip(image_size, room))
        height, width = (min(most, math.ceil(side * scale)) for side, most in zip(image_size, room))
        return height, width

    def tile_boxes(self, image_size: Sequence[int], square: float | None = None) -> np.ndarray:
        """What each tile shows of an image of (height, width) pixels: `process` seen from the other side.

        Args:
            square: without pinpoints, side of the centred square that the tile shows; None if the image is stretched.

        Returns:
            `(tiles, 4)` as top, left, bottom, right, in pixels of the image; what lies beyond it is padding.
        """
        if self.pinpoints:
            room = self.pinpoint(image_size)
            size = self.fit(image_size, room)
            offset = [(most - side) // 2 for most, side in zip(room, size)]
            return np.concatenate([[(0, 0, *image_size)], self._cut_boxes(image_size, size, offset)])
        if square is None:
            return np.array([(0, 0, *image_size)], dtype=float)
        margins = (np.array(image_size) - square) / 2
        return np.concatenate([margins, margins + square])[None]

    def _cut_boxes(self, image_size: Sequence[int], size: Sequence[int], offset: Sequence[int]) -> np.ndarray:
        """The boxes of the tiles cut from an image that is resized to `size` and begins at `offset` in its tiling."""
        cells = np.indices(self.tiling(image_size)).reshape(2, -1).T  # (tiles, 2), rows and columns
        corners = np.stack([cells, cells + 1], axis=1) * self.tile_size - np.array(offset)
        return (corners * np.divide(image_size, size)).reshape(-1, 4)

    def num_tokens(self, image_size: Sequence[int], downsample: int) -> int:
        """Vision tokens of an image of (height, width) pixels, newlines and separators included."""
        regions = tokens_per_side(self.grid_size, downsample) ** 2
        tiles = torch.zeros(self.num_tiles(image_size), regions, 1, device="cpu")
        return len(self.pack(tiles, image_size, torch.zeros(2, 1, device="cpu")))

    def pack(self, tiles: torch.Tensor, image_size: Sequence[int], separators: torch.Tensor | None) -> torch.Tensor:
        """One image's tiles `(tiles, tokens, features)` as one sequence `(tokens, features)`.

        `separators` `(separators, features)` holds what the layout puts between tokens.
        """
        return tiles.flatten(0, 1)


class SpatialLayout(ImageLayout):
    """The base tile, then the others merged to one grid, row by row."""

    def pack(self, tiles: torch.Tensor, image_size: Sequence[int], separators: torch.Tensor | None) -> torch.Tensor:
        grid = to_grid(tiles[1:]).unflatten(0, self.tiling(image_size))  # (rows, columns, t, t, features)
        grid = grid.transpose(1, 2).flatten(0, 1).flatten(1, 2)  # (rows * t, columns * t, features)
        return torch.cat([tiles[0], self.finish(grid, image_size, separators).flatten(0, 1)])

    def finish(self, grid: torch.Tensor, image_size: Sequence[int], separators: torch.Tensor | None) -> torch.Tensor:
        return grid


class SpatialUnpadLayout(SpatialLayout):
    """As "spatial", without the tokens of padding, and with a newline after each row (LLaVA-NeXT)."""

    def finish(self, grid: torch.Tensor, image_size: Sequence[int], separators: torch.Tensor | None) -> torch.Tensor:
        tokens = grid.shape[0] // self.tiling(image_size)[0]  # per side of a tile
        grid = grid[self.unpad(*grid.shape[:2], image_size)]
        size = self.resample(*grid.shape[:2], tokens)
        if size != tuple(grid.shape[:2]):
            grid = F.interpolate(grid.permute(2, 0, 1)[None], size, mode="bilinear")[0].permute(1, 2, 0)
        return torch.cat([grid, separators[0].to(grid).expand(len(grid), 1, -1)], dim=1)

    @staticmethod
    def unpad(rows: int, columns: int, image_size: Sequence[int]) -> tuple[slice, slice]:
        """The rows and columns of the merged grid that show the image and not its padding (LLaVA-NeXT's rule)."""
        height, width = image_size
        if width / height > columns / rows:
            padding = (rows - int(round(height * (columns / width), 7))) // 2
            return slice(padding, rows - padding), slice(0, columns)
        padding = (columns - int(round(width * (rows / height), 7))) // 2
        return slice(0, rows), slice(padding, columns - padding)

    def resample(self, rows: int, columns: int, tokens: int) -> tuple[int, int]:
        """The grid to which a grid of tokens is resampled (LLaVA-OneVision's rule: only past 1.1 times the limit)."""
        if self.max_tiles is not None:
            ratio = math.sqrt(rows * columns / (self.max_tiles * tokens**2))
            if ratio > 1.1:
                return max(1, int(rows // ratio)), max(1, int(columns // ratio))
        return rows, columns


class SlicesLayout(ImageLayout):
    """Tile after tile, a separator after each, the base tile last (TokenPacker-HD).

    The first separator stands between two tiles of a row, the second after a row and after the base tile. An image of
    one tile has no base tile. Which tiling an image gets, and how it is resized and padded, are TokenPacker's too.
    """

    def num_tiles(self, image_size: Sequence[int]) -> int:
        tiles = math.prod(self.tiling(image_size))
        return tiles + (tiles > 1)

    def pinpoint(self, image_size: Sequence[int]) -> tuple[int, int]:
        """The first of the pinpoints that the image fills best; between equals, the nearest to 1.4 times its size."""

        def score(pinpoint: tuple[int, int]) -> float:
            area, scale = math.prod(pinpoint), min(room / side for side, room in zip(image_size, pinpoint))
            filled = math.prod(round(side * scale) for side in image_size) / area
            common = math.prod(min(1.4 * side, room) for side, room in zip(image_size, pinpoint))
            return filled + 0.1 * common / (area + 1.4**2 * math.prod(image_size) - common)

        return max(self.pinpoints, key=score)

    def fit(self, image_size: Sequence[int], room: Sequence[int]) -> tuple[int, int]:
        scale = min(most / side for side, most in zip(image_size, room))
        height, width = (min(most, max(1, round(side * scale))) for side, most in zip(image_size, room))
        return height, width

    def tile_boxes(self, image_size: Sequence[int], square: float | None = None) -> np.ndarray:
        room = self.pinpoint(image_size)
        size = self.fit(image_size, room)
        boxes = self._cut_boxes(image_size, size, (0, 0))
        if len(boxes) > 1:
            base = self.fit(image_size, (self.tile_size, self.tile_size))  # of the image padded to `room`
            shown = np.divide(image_size, size) * room * self.tile_size / base
            boxes = np.concatenate([[(0, 0, *shown)], boxes])
        return boxes

    def process(
        self,
        images: list[np.ndarray],
        image_processor: BaseImageProcessor,
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        fields = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
        normalize = PilBackend(**{field: getattr(image_processor, field) for field in fields})
        tiles = [self.cut_tiles(torch.from_numpy(image)) for image in normalize(images, **kwargs)["pixel_values"]]
        return BatchFeature({"pixel_values": pad_sequence(tiles, batch_first=True).numpy()}, tensor_type=return_tensors)

    def cut_tiles(self, image: torch.Tensor) -> torch.Tensor:
        """The tiles `(tiles, 3, tile_size, tile_size)` of a normalized image `(3, height, width)`, base tile first.

        The base tile shows the padded image, its padding included, within the bounds that the image alone would have.
        """
        size, side = image.shape[1:], self.tile_size
        padded = self._resize_and_pad(image.float(), size, self.pinpoint(size))
        tiles = padded.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # (3, rows, side, columns, side)
        tiles = tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)
        if len(tiles) > 1:
            tiles = torch.cat([self._resize_and_pad(padded, size, (side, side))[None], tiles])
        return tiles

    def _resize_and_pad(self, image: torch.Tensor, size: Sequence[int], room: tuple[int, int]) -> torch.Tensor:
        """Resizes an image to what one of `size` would fill of `room`, and pads it at the bottom and right."""
        height, width = self.fit(size, room)
        image = F.interpolate(image[None], (height, width), mode="bilinear")[0]
        return F.pad(image, (0, room[1] - width, 0, room[0] - height))

    def pack(self, tiles: torch.Tensor, image_size: Sequence[int], separators: torch.Tensor | None) -> torch.Tensor:
        rows, columns = self.tiling(image_size)
        after = ([0] * (columns - 1) + [1]) * rows + [1] * (rows * columns > 1)
        slices = tiles.roll(-1, 0)  # the base tile last
        return torch.cat([slices, separators.to(slices)[after].unsqueeze(1)], dim=1).flatten(0, 1)


LAYOUTS: dict[str, type[ImageLayout]] = {
    "spatial_unpad": SpatialUnpadLayout,
    "spatial": SpatialLayout,
    "flat": ImageLayout,
    "slices": SlicesLayout,
}


def make_layout(
    image_aspect_ratio: str,
    image_merge_type: str,
    tile_size: int,
    patch_size: int,
    pinpoints: Sequence[Sequence[int]] | None,
) -> ImageLayout:
    """The layout of a configuration's or a processor's fields of these names.

    Raises:
        ValueError: a value does not exist, or two do not go together.
    """
    number = re.fullmatch("anyres_max_([1-9][0-9]*)", image_aspect_ratio)
    if image_aspect_ratio not in ("anyres", "pad", "square") and not number:
        raise ValueError(
            f"image_aspect_ratio must be anyres, anyres_max_N (N > 0), pad or square, found {image_aspect_ratio!r}."
        )
    if image_merge_type not in LAYOUTS:
        raise ValueError(f"image_merge_type must be one of {', '.join(LAYOUTS)}, found {image_merge_type!r}.")
    if number and image_merge_type != "spatial_unpad":
        raise ValueError(
            f"image_merge_type must be spatial_unpad with {image_aspect_ratio}, found {image_merge_type!r}."
        )
    if image_merge_type == "slices" and image_aspect_ratio != "anyres":
        raise ValueError(
            f"image_aspect_ratio must be anyres with image_merge_type slices, found {image_aspect_ratio!r}."
        )
    if not image_aspect_ratio.startswith("anyres"):
        return ImageLayout(tile_size, tile_size // patch_size)
    if not pinpoints:
        raise ValueError(f"image_grid_pinpoints must not be empty with image_aspect_ratio {image_aspect_ratio!r}.")
    for pair in pinpoints:
        if (
            not isinstance(pair, (list, tuple))
            or len(pair) != 2
            or any(not isinstance(side, int) or side < tile_size or side % tile_size for side in pair)
        ):
            raise ValueError(
                f"image_grid_pinpoints must be (height, width) pairs of multiples of the tile, {tile_size} pixels; "
                f"found {pair}."
            )
    max_tiles = int(number[1]) if number else None
    return LAYOUTS[image_merge_type](tile_size, tile_size // patch_size, tuple(map(tuple, pinpoints)), max_tiles)
