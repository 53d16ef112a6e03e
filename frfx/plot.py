"""Figures: where, and by how much, a feature map is wrong (Fig. 4 of the paper)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from frfx.errors import FrfxError, InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def feature_maps(
    forward: Tensor,
    target: Tensor,
    *,
    images: Tensor | None = None,
    captions: list[str] | None = None,
    channels: int = 4,
) -> Figure:
    """Draw forward features, reconstructed features and their absolute difference side by side.

    Args:
        forward: `a^`, shape (N, C, H, W), or (N, D), drawn as one square-ish map.
        target: `a*`, of the same shape.
        images: The inputs (N, C, H, W), drawn in front if given.
        captions: One line a sample.
        channels: How many channels to draw, the first ones.

    Returns:
        A matplotlib figure; `figure.savefig(path)` writes it.

    Raises:
        InputError: If the shapes differ or are no features, or there is nothing to draw, or images
            or captions are missing.
        FrfxError: If matplotlib is missing (extra `frfx[plot]`).
    """
    figure_class = _figure()
    if forward.shape != target.shape or forward.ndim not in (2, 4):
        raise InputError(
            f"features of the shapes {tuple(forward.shape)} and {tuple(target.shape)}: expected "
            "(N, C, H, W) or (N, D) twice"
        )
    if not len(forward) or channels < 1:
        raise InputError(f"nothing to draw of {len(forward)} samples and {channels} channels")
    for name, given in (("images", images), ("captions", captions)):
        if given is not None and len(given) < len(forward):
            raise InputError(f"{len(given)} {name} for {len(forward)} features: give one each")
    had, wanted = _as_maps(forward), _as_maps(target)
    samples, shown = had.shape[0], min(channels, had.shape[1])
    columns = 3 * shown + (images is not None)
    figure = figure_class(figsize=(1.1 * columns, 1.25 * samples + 0.7), layout="constrained")
    axes = figure.subplots(samples, columns, squeeze=False)
    difference = (had - wanted).abs()
    for row in range(samples):
        column = 0
        if images is not None:
            picture = images[row].detach().cpu().float()
            picture = (picture - picture.amin()) / (picture.amax() - picture.amin()).clamp(1e-12)
            pixels = picture.permute(1, 2, 0) if picture.shape[0] == 3 else picture[0]
            _draw(axes[row][0], pixels, "input" if row == 0 else "", cmap="gray")
            column = 1
        limit = float(
            torch.maximum(had[row, :shown].abs().amax(), wanted[row, :shown].abs().amax())
        )
        for channel in range(shown):
            for block, (values, name, options) in enumerate(
                (
                    (had, "forward", {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}),
                    (wanted, "reconstructed", {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}),
                    (difference, "|difference|", {"cmap": "viridis", "vmin": 0, "vmax": limit}),
                )
            ):
                title = f"{name} {channel}" if row == 0 else ""
                _draw(
                    axes[row][column + block * shown + channel],
                    values[row, channel],
                    title,
                    **options,
                )
        if captions is not None:
            axes[row][0].set_ylabel(captions[row], fontsize=7)
    return figure


def check_format(path: Path) -> None:
    """Raise `FrfxError` for a file of a kind that matplotlib does not write, or without it."""
    known = _figure()().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise FrfxError(f"{str(path)!r} is no figure: its name ends in .{', .'.join(known)}")


def _figure() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FrfxError("figures need matplotlib: pip install 'frfx[plot]'") from error
    return Figure


def _draw(axis, values: Tensor, title: str, **options) -> None:  # type: ignore[no-untyped-def]
    axis.imshow(values.numpy(), interpolation="nearest", **options)
    axis.set_title(title, fontsize=6)
    axis.set_xticks([])
    axis.set_yticks([])


def _as_maps(feature: Tensor) -> Tensor:
    """Return a feature as images; a vector becomes one, padded with zeros to a rectangle."""
    feature = feature.detach().cpu().float()
    if feature.ndim == 4:
        return feature
    width = int(feature.shape[1] ** 0.5)
    height = -(-feature.shape[1] // width)
    padded = torch.nn.functional.pad(feature, (0, height * width - feature.shape[1]))
    return padded.view(len(feature), 1, height, width)
