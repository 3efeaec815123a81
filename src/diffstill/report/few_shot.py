"""What a page shows of models made from a few images: the images, copies, diversity, and what real images score."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from ..evaluation.results import Estimate, FewShotProtocol, ModelEvaluation, ScalePoint
from . import plots, words
from .frontier import AGAIN
from .receipt import Receipt
from .views import Picture, Table, picture, thousandfold

REAL = "held-out images"


@dataclass(frozen=True)
class FewImages:
    """The section's content."""

    lead: str
    shots: Picture | None
    pairs: list[tuple[str, Picture]]
    """Role and its samples above their nearest shots."""
    plots: list[Markup | None]
    table: Table


def few_images(receipt: Receipt, run_dir: Path) -> FewImages | None:
    """The section of a receipt with few-shot figures, None for another."""
    protocol = receipt.protocol.few_shot if receipt.protocol else None
    if receipt.protocol is None or protocol is None:
        return None
    metric = receipt.protocol.extractor.name
    shots = next((found for m in receipt.baselines.values() if (found := m.images.get("shots"))), None)
    told = {
        role: picture(run_dir, m.images.get("nearest"), f"samples of the {role} and their nearest shots")
        for role, m in receipt.models.items()
        if AGAIN not in role
    }
    rows = {role: m.best for role, m in {**receipt.models, **receipt.baselines}.items()}
    known = {role: point for role, point in rows.items() if point is not None and point.few_shot is not None}
    floor = receipt.protocol.floor or Estimate(value=None)
    return FewImages(
        lead=_lead(protocol, receipt.protocol.reference),
        shots=picture(run_dir, shots, "the few images that were trained on"),
        pairs=[(role, found) for role, found in told.items() if found],
        plots=[
            plots.quality_against(known, "diversity_share", f"{metric} against diversity", (1.0, floor)),
            plots.quality_against(known, "memorised", f"{metric} against copies", (protocol.near, floor)),
        ],
        table=_table(receipt, metric, protocol),
    )


def _lead(protocol: FewShotProtocol, reference: str) -> str:
    images = "image" if protocol.shots == 1 else "images"
    return (
        f"Adapted to {protocol.shots} {images}, and measured against all others of their domain ({reference}). A model "
        "that only repeats the few has a low distance too: read it beside the diversity and the share of copies."
    )


def _table(receipt: Receipt, metric: str, protocol: FewShotProtocol) -> Table:
    header = ["model", metric, "diversity, of the real", "copies", "nearest shot", "source distance", "NFE"]
    header += ["one image", "at", "KID \u00d7\u202f1000", "precision", "recall", "diversity", "shots without pairs"]
    measured = [*receipt.models.items(), *receipt.baselines.items()]
    rows = [_row(role, m, m.best) for role, m in measured if m.best is not None and m.best.few_shot is not None]
    point = next((m.best.few_shot for _, m in measured if m.best is not None and m.best.few_shot is not None), None)
    floor = receipt.protocol.floor if receipt.protocol else None
    if point is not None:
        whole, chance = (words.percent(Estimate(value=value)) for value in (1.0, protocol.near))
        real = [REAL, words.estimate(floor), whole, chance, words.number(1.0), words.estimate(point.target_source_fd)]
        rows.append([*real, "", "", "", "", "", "", words.estimate(point.real_diversity), ""])
    note = (
        "Diversity: mean distance of pairs within the clusters of the nearest shot. Copies: samples nearer to a shot "
        f"than {100 * (1 - protocol.near):.0f}\u202f% of the held-out images are; {100 * protocol.near:.0f}\u202f% is "
        "chance. Nearest shot: mean distance to it, over that of the held-out images. "
        f"Shots without pairs have one sample near them or none. {REAL.capitalize()}: one half against the other."
    )
    if protocol.source is not None:
        note += f" Source distance: to {protocol.source}; full adaptation arrives where the held-out images are."
    return Table("Few images", header, rows, 1, note).without_empty_columns()


def _row(role: str, model: ModelEvaluation, point: ScalePoint | None) -> list[str]:
    assert point is not None
    found = point.few_shot
    assert found is not None
    left_out = words.number(found.empty_clusters + found.singleton_clusters, 2)
    one = next((item.median_s for item in model.cost.latency if item.batch == 1), None) if model.cost else None
    return [
        role,
        words.estimate(point.fd),
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
