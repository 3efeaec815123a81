"""What a page shows of models made from a few images: the images, copies, diversity, and what real images score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from ..evaluation.results import Estimate, FewShotProtocol, ModelEvaluation, ScalePoint
from . import plots, words
from .frontier import AGAIN
from .receipt import Receipt
from .views import PIXELS, Picture, Table, picture, thousandfold

REAL = "held-out images"


@dataclass(frozen=True)
class FewImages:
    """The section's content."""

    lead: str
    shots: Picture | None
    pairs: list[tuple[str, Picture]]
    """Role and its samples above their nearest shots."""
    pairs_note: str
    plots: list[Markup | None]
    plots_note: str
    table: Table
    alone: bool
    """Whether there are no other images of their domain."""


def few_images(receipt: Receipt, run_dir: Path) -> FewImages | None:
    """The section of a receipt with few-shot figures, None for another."""
    protocol = receipt.protocol.few_shot if receipt.protocol else None
    if receipt.protocol is None or protocol is None:
        return None
    metric = words.metric(receipt.protocol)
    shots = next((found for m in receipt.baselines.values() if (found := m.images.get("shots"))), None)
    told = {
        role: picture(run_dir, m.images.get("nearest"), f"samples of the {role} and their nearest shots")
        for role, m in receipt.models.items()
        if AGAIN not in role
    }
    rows = {role: words.shown(m, protocol) for role, m in {**receipt.models, **receipt.baselines}.items()}
    known = {role: point for role, point in rows.items() if point is not None and point.few_shot is not None}
    floor = receipt.protocol.floor or Estimate(value=None)
    return FewImages(
        lead=_lead(protocol, receipt.protocol.reference),
        shots=picture(run_dir, shots, "the few images that were trained on"),
        pairs=[(role, found) for role, found in told.items() if found],
        pairs_note=_pairs_note(protocol),
        plots=[
            plots.quality_against(known, "diversity_share", f"{metric} against diversity", (1.0, floor)),
            plots.quality_against(known, "memorised", f"{metric} against copies", (protocol.near, floor)),
        ],
        plots_note=_plots_note(protocol),
        table=_table(known, receipt, metric, protocol),
        alone=protocol.alone,
    )


def _lead(protocol: FewShotProtocol, reference: str) -> str:
    images = "image" if protocol.shots == 1 else "images"
    if protocol.alone and protocol.shots == 1:
        return (
            "Adapted to 1 image. There are no other images of its domain, so nothing is known of how far samples are "
            "from the domain, how varied it is, or whether they are copies. Look at them beside the image."
        )
    if protocol.alone:
        return (
            f"Adapted to {protocol.shots} images. There are no other images of their domain, so distances are to the "
            "very images that were trained on: a low one is a copy, not quality, and how varied the domain is is not "
            "known. Read the share of copies first, and look at the samples beside their nearest images."
        )
    return (
        f"Adapted to {protocol.shots} {images}, and measured against all others of their domain ({reference}). A model "
        "that only repeats the few has a low distance too: read it beside the diversity and the share of copies."
    )


def _pairs_note(protocol: FewShotProtocol) -> str:
    told = (
        "Samples and, below each, the image of the few that is nearest to it; the nearest pair first. The number is "
        "their distance"
    )
    if not protocol.alone:
        return f"{told} over that of a held-out image to its nearest: near 0 a copy, about 1 a new image."
    if not protocol.copies_known:
        return f"{told} ({protocol.distance}): 0 a copy; what is far is not known."
    return f"{told} over that of one of the few to its nearest other: near 0 a copy, about 1 as far as they are apart."


def _plots_note(protocol: FewShotProtocol) -> str:
    if protocol.alone:
        return "Down is nearer to the images trained on, to the right are more copies: low and right is a memory."
    return (
        "Down is nearer to the real images. Left: to the right is as varied as they are. Right: to the left is fewer "
        "copies. Real images: one half of the held-out ones against the other."
    )


def _table(known: Mapping[str, ScalePoint], receipt: Receipt, metric: str, protocol: FewShotProtocol) -> Table:
    header = ["model", metric, PIXELS, "diversity, of the real", "copies", "nearest shot", "source distance", "NFE"]
    header += ["one image", "at", "KID \u00d7\u202f1000", "precision", "recall", "diversity", "shots without pairs"]
    measured = {**receipt.models, **receipt.baselines}
    rows = [_row(role, measured[role], point) for role, point in known.items()]
    point = next((found.few_shot for found in known.values()), None)
    floors = (receipt.protocol.floor, receipt.protocol.floor_pixels) if receipt.protocol else (None, None)
    if point is not None and not protocol.alone:
        whole, chance = (words.percent(Estimate(value=value)) for value in (1.0, protocol.near))
        real = [REAL, *map(words.estimate, floors), whole, chance, words.number(1.0)]
        real.append(words.estimate(point.target_source_fd))
        rows.append([*real, "", "", "", "", "", "", words.estimate(point.real_diversity), ""])
    return Table("Few images", header, rows, 1, _table_note(protocol)).without_empty_columns()


def _table_note(protocol: FewShotProtocol) -> str:
    note = f"{PIXELS}: the distance of the pixels themselves; where it disagrees with the other, look at the samples. "
    note += "Diversity: mean distance of pairs within the clusters of the nearest shot. "
    many, few = (f"{100 * share:.0f}\u202f%" for share in (1 - protocol.near, protocol.near))
    if not protocol.alone:
        note += (
            f"Copies: samples nearer to a shot than {many} of the held-out images are; {few} is chance, "
            "more where few are held out. "
            "Nearest shot: mean distance to it, over that of the held-out images. "
        )
    elif protocol.copies_known:
        note += (
            f"Copies: samples as near to a shot as the nearest {few} of the shots are to another. "
            "Nearest shot: mean distance to it, over that of the shots to their nearest other. "
        )
    note += "Shots without pairs have one sample near them or none."
    if protocol.alone:
        return note + (f" Source distance: to {protocol.source}." if protocol.source is not None else "")
    note += f" {REAL.capitalize()}: one half against the other."
    if protocol.source is not None:
        note += f" Source distance: to {protocol.source}; full adaptation arrives where the held-out images are."
    return note


def _row(role: str, model: ModelEvaluation, point: ScalePoint) -> list[str]:
    found = point.few_shot
    assert found is not None
    left_out = words.number(found.empty_clusters + found.singleton_clusters, 2)
    one = next((item.median_s for item in model.cost.latency if item.batch == 1), None) if model.cost else None
    return [
        role,
        words.estimate(point.fd),
        words.estimate(point.fd_pixels),
        words.percent(found.diversity_share),
        words.percent(found.memorised),
        words.estimate(found.nearest_ratio),
        words.estimate(found.source_fd),
        str(point.nfe) if point.nfe else "",
        words.seconds(one) if one is not None else "",
        words.short_guidance(point.guidance) if point.nfe else "",
        *map(words.estimate, (thousandfold(point.kid), point.precision, point.recall, found.diversity)),
        f"{left_out} of {len(found.cluster_sizes)}",
    ]
