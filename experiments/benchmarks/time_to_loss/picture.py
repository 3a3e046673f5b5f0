"""Both sides' validation loss over the seconds of training, as a picture."""

from pathlib import Path
from typing import Any

COLOURS = {"peer": "#777777", "ours": "#c2410c"}


def draw(seeds: list[dict[str, Any]], path: Path, peer_name: str) -> None:
    """One line for each side and seed, and a mark where ours reaches the best loss of the peer.

    Args:
        seeds: of each, `ours` and `peer` with their curves, `target` and `our_seconds`.
        path: `.png`, `.svg` or `.pdf`.
        peer_name: for the legend.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    for number, seed in enumerate(seeds):
        for side, name in (("peer", peer_name), ("ours", "modern_llm")):
            curve = seed[side]["curve"]
            axes.plot(
                [point["seconds"] for point in curve],
                [point["loss"] for point in curve],
                color=COLOURS[side], linewidth=1.4, label=name if number == 0 else None,
            )  # fmt: skip
        if seed["our_seconds"] is not None:
            axes.plot(
                seed["our_seconds"], seed["our_loss"], "o", color=COLOURS["ours"], markersize=5,
                label=f"reaches the best loss of {peer_name}" if number == 0 else None,
            )  # fmt: skip
        axes.axhline(seed["target"], color=COLOURS["peer"], linewidth=0.6, linestyle=":")
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("validation loss, nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
