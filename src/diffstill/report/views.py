"""What a page shows, as plain data: tiles, tables, pictures and facts made from the documents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ..evaluation.results import Estimate, FewShotProtocol, FidelityBin, Latency, ModelEvaluation, Protocol
from . import words
from .pictures import data_uri
from .plots import cost_rows
from .receipt import DataSummary, Environment, Receipt


@dataclass(frozen=True)
class Tile:
    """One key figure."""

    value: str
    label: str
    note: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """Formatted cells; the first ``names`` columns are words, the others numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 1
    note: str = ""

    def without_empty_columns(self) -> Table:
        keep = [i for i in range(len(self.header)) if any(row[i] not in ("", words.MISSING) for row in self.rows)]
        rows = [[row[i] for i in keep] for row in self.rows]
        return Table(self.title, [self.header[i] for i in keep], rows, sum(i < self.names for i in keep), self.note)


@dataclass(frozen=True)
class Picture:
    """A PNG inside the page."""

    uri: str
    width: int
    height: int
    alt: str


def picture(run_dir: Path, relative: str | None, alt: str) -> Picture | None:
    """The PNG at ``relative``, or None where there is none.

    A receipt may come from anywhere: a path that leads out of the run folder is not followed.
    """
    if not relative:
        return None
    path = (run_dir / relative).resolve()
    if not path.is_relative_to(run_dir.resolve()) or not path.is_file():
        return None
    content = path.read_bytes()
    try:
        with Image.open(BytesIO(content), formats=["PNG"]) as image:
            width, height = image.size
    except (UnidentifiedImageError, OSError):
        return None
    return Picture(data_uri(content), width, height, alt)


def sweep_pictures(
    models: Mapping[str, ModelEvaluation], run_dir: Path
) -> tuple[list[str], list[tuple[str, list[Picture | None]]]]:
    """(column names, rows of (role, picture at each guidance)) of the ``sweep:<guidance>`` pictures."""
    known = [p.guidance for m in models.values() for p in m.sweep]
    stored = [key[6:] for m in models.values() for key in m.images if key.startswith("sweep:")]
    columns = [g for g in dict.fromkeys([*known, *stored]) if g in stored]
    rows = []
    for role, model in models.items():
        found = [picture(run_dir, model.images.get(f"sweep:{g}"), f"{role}, {words.guidance_name(g)}") for g in columns]
        if any(found):
            rows.append((role, found))
    return [words.guidance_name(g) for g in columns], rows


def tiles(receipt: Receipt) -> list[Tile]:
    """The key figures of a run, against the teacher where there is one."""
    if receipt.subject is None:
        return []
    role, model = receipt.subject
    teacher = receipt.teacher if role != receipt.teacher_role else None
    made = _cost_tiles(model, teacher)
    metric = receipt.protocol.extractor.name if receipt.protocol else "FD"
    if model.best is not None:
        other = teacher.best if teacher else None
        note = "" if model.images_alone else f"at {words.guidance_name(model.best.guidance)}"
        note += f"; teacher {words.number(other.fd.value)}" if other else ""
        to = ", to the images trained on" if words.alone(receipt.protocol) else ""
        made.append(Tile(words.number(model.best.fd.value), f"best {metric}{to}", note))
        agreement = model.best.class_agreement
        if agreement is not None and agreement.value is not None:
            theirs = other.class_agreement if other else None
            note = f"teacher {words.percent(_bare(theirs))}" if theirs else "as a classifier sees them"
            made.append(Tile(words.percent(_bare(agreement)), "show the class asked for", note))
    if model.fidelity is not None:
        tone, overall = words.guidance_state(model.fidelity)[0], model.fidelity.overall
        made.append(
            Tile(
                words.number(overall.ratio.value, 2),
                "guidance gap ratio",
                "teacher 1, collapsed under 0.5",
                tone,
            )
        )
        made.append(
            Tile(
                words.number(overall.cosine.value, 2),
                "guidance gap cosine",
                "1 is the teacher\u2019s direction",
                tone,
            )
        )
    return made


def _bare(found: Estimate) -> Estimate:
    return Estimate(value=found.value)


def _cost_tiles(model: ModelEvaluation, teacher: ModelEvaluation | None) -> list[Tile]:
    if model.cost is None:
        return []
    if teacher is None or teacher.cost is None:
        return [
            Tile(
                words.si(model.cost.parameters),
                "parameters",
                f"{words.number(model.cost.size_mb)}{words.THIN}MB",
            ),
            Tile(words.si(model.cost.flops_image), "FLOPs an image", f"{model.cost.nfe} network evaluations"),
        ]
    names = {"parameters": "{} parameters", "FLOPs an image": "{} FLOPs an image"}
    made, rows = [], cost_rows(teacher.cost, model.cost)
    slowest = [row for row in rows if row[0].startswith("batch of")][-1:]
    for what, theirs, ours, write in [row for row in rows if row[0] in names] + slowest:
        less = not (theirs and ours) or theirs >= ours
        share = words.times(theirs, ours) if less else words.times(ours, theirs)
        counted = names[what].format("fewer" if less else "more") if what in names else None
        label = counted or f"{'faster' if less else 'slower'}, {what}"
        made.append(Tile(share or words.MISSING, label, f"{write(theirs)} \u2192 {write(ours)}"))
    return made


PIXELS = "FD-pixels"


def sweep_table(models: Mapping[str, ModelEvaluation], metric: str) -> Table:
    """Every sweep point of every model; the best of each model is starred."""
    header = [
        "model",
        "guidance",
        "evaluations",
        metric,
        f"{metric} test",
        PIXELS,
        "KID \u00d7\u202f1000",
        "precision",
        "recall",
        "class agreement",
        "Inception score" if metric.split()[0] == "FID" else "score by classes",
        "diversity, of the real",
        "copies",
    ]
    rows = []
    for role, model in models.items():
        for point in model.sweep:
            name = words.short_guidance(point.guidance) + (" \u2605" if point is model.best else "")
            told = (point.fd_test, point.fd_pixels, thousandfold(point.kid), point.precision, point.recall)
            rows.append(
                [
                    role,
                    name,
                    str(point.nfe),
                    words.estimate(point.fd),
                    *map(words.estimate, told),
                    words.percent(point.class_agreement),
                    words.estimate(point.inception_score),
                    words.percent(point.few_shot.diversity_share if point.few_shot else None),
                    words.percent(point.few_shot.memorised if point.few_shot else None),
                ]
            )
    note = "\u2605 the model\u2019s best. Brackets: two-sided 95\u202f% intervals."
    title = "Figures" if all(model.images_alone for model in models.values()) else "Guidance sweep"
    return Table(title, header, rows, 2, note).without_empty_columns()


def thousandfold(found: Estimate | None) -> Estimate | None:
    """Small numbers as they stand in tables."""
    if found is None:
        return None
    value, low, high = (None if x is None else 1000 * x for x in (found.value, found.low, found.high))
    return Estimate(value=value, low=low, high=high, level=found.level)


def fidelity_table(title: str, bins: Iterable[FidelityBin]) -> Table:
    """The guidance gap of student against teacher, a row a bin."""
    header = [
        "held-out pairs",
        "number",
        "gap ratio",
        "cosine",
        "gap MSE \u00d7\u202f1000",
        "cond MSE \u00d7\u202f1000",
    ]
    header += ["null MSE \u00d7\u202f1000", "best rescale a*"]
    rows = []
    for b in bins:
        errors = map(thousandfold, (b.gap_mse, b.cond_mse, b.null_mse))
        rows.append([b.label, words.count(b.pairs), *map(words.estimate, (b.ratio, b.cosine, *errors, b.best_rescale))])
    return Table(title, header, rows)


def cost_table(models: Mapping[str, ModelEvaluation]) -> Table:
    """What each model costs to keep and to run."""
    header = ["model", "parameters", "FLOPs a forward", "evaluations an image", "FLOPs an image", "size"]
    costs = {role: model.cost for role, model in models.items() if model.cost is not None}
    batches = list(dict.fromkeys(latency.batch for cost in costs.values() for latency in cost.latency))
    header += [f"batch of {batch}, median [p10, p90]" for batch in batches]
    rows = []
    for role, cost in costs.items():
        known = {latency.batch: latency for latency in cost.latency}
        size = f"{words.number(cost.size_mb)}{words.THIN}MB"
        flops = [words.si(cost.flops_forward), str(cost.nfe), words.si(cost.flops_image)]
        times = [_latency(known.get(batch)) for batch in batches]
        rows.append([role, words.count(cost.parameters), *flops, size, *times])
    return Table("Cost", header, rows)


def _latency(found: Latency | None) -> str:
    if found is None:
        return words.MISSING
    return f"{words.seconds(found.median_s)} [{words.seconds(found.p10_s)}, {words.seconds(found.p90_s)}]"


def subject_table(models: Mapping[str, ModelEvaluation]) -> Table:
    """Pictures of one subject beside the few images of it."""
    header = ["model", "samples", "to the nearest image", "between samples", "between the few images"]
    rows = [
        [role, str(m.subject.samples), words.estimate(m.subject.nearest), words.number(m.subject.spread),
         words.number(m.subject.real_spread)]
        for role, m in models.items()
        if m.subject is not None
    ]  # fmt: skip
    note = "Root mean square of pixels on [-1, 1]: it tells copies (0) and collapse (no distance between samples), "
    note += "not likeness. The cost above is the U-Net's alone: decoding the latents comes on top, for all the same."
    return Table("The subject", header, rows, 1, note)


def training_table(receipt: Receipt) -> Table:
    """What each training took."""
    header = ["model", "method", "parameters", "steps", "images seen", "time", "images/s"]
    rows = [
        [
            t.name,
            t.method,
            *map(words.count, (t.parameters, t.steps, t.images_seen)),
            words.seconds(t.seconds),
            words.number(t.images_per_s),
        ]
        for t in receipt.training
    ]
    return Table("Training", header, rows, 2)


def lineage_table(receipt: Receipt) -> Table:
    """Who descends from whom, with the hashes."""
    header = ["model", "method", "parent", "recipe", "data", "weights"]
    rows = [
        [
            a.name,
            a.method,
            a.parent or words.MISSING,
            a.recipe_sha256[:12],
            a.data_fingerprint[:16],
            a.weights_sha256[:12],
        ]
        for a in receipt.lineage
    ]
    return Table("Lineage", header, rows, 6, "Hashes are the first digits of SHA-256.").without_empty_columns()


def protocol_facts(protocol: Protocol) -> list[tuple[str, str]]:
    """What has to be equal for two numbers to be compared, in words."""
    extractor = protocol.extractor
    none = protocol.floor_of if words.alone(protocol) else words.MISSING
    accuracy = f", test accuracy {100 * extractor.accuracy:.1f}{words.THIN}%" if extractor.accuracy is not None else ""
    return [
        ("distance", f"{extractor.name}: {extractor.dim} features, resize {extractor.resize}{accuracy}"),
        ("extractor hash", extractor.sha256[:16]),
        ("reference", f"{protocol.reference} ({protocol.reference_sha256[:16]})"),
        ("samples", f"{words.count(protocol.samples)} a setting, {protocol.weights} weights"),
        ("sampler", f"{protocol.sampler}, {protocol.steps} steps, clip: {protocol.clip}"),
        ("guidance", ", ".join(map(words.short_guidance, protocol.guidance))),
        ("labels", protocol.labels),
        ("sampling seeds", ", ".join(map(str, protocol.seeds))),
        (
            "floor",
            f"{words.estimate(protocol.floor)} ({protocol.floor_of})" if protocol.floor else none,
        ),
        *(_few_shot_facts(protocol.few_shot) if protocol.few_shot else []),
    ]


def _few_shot_facts(found: FewShotProtocol) -> list[tuple[str, str]]:
    near = "the test images are" if not found.alone else "the shots are to each other"
    copies = f"as near to a shot as {100 * found.near:.0f}{words.THIN}% of {near}"
    source = f"{found.source} ({found.source_sha256[:16]})" if found.source else "not given"
    return [
        ("trained on", f"{words.count(found.shots)} image{'s' * (found.shots > 1)} ({found.shots_sha256[:16]})"),
        ("diversity", f"{found.diversity}, the first {found.per_cluster} samples a cluster"),
        ("distance between images", found.distance),
        ("copies", copies if found.copies_known else "not known: a single picture has no other to be near to"),
        ("source domain", source),
        ("selection", found.selection),
    ]


def data_facts(data: DataSummary) -> list[tuple[str, str]]:
    splits = ", ".join(
        f"{name} {words.count(size)}" for name, size in sorted(data.splits.items(), key=lambda item: -item[1])
    )
    return [
        ("data", f"{data.name} ({data.fingerprint})"),
        ("splits", splits),
        ("images", f"{data.shape[1]} \u00d7 {data.shape[2]}, {'grey' if data.shape[0] == 1 else 'colour'}"),
        ("classes", f"{len(data.classes)}: {', '.join(data.classes)}"),
        *_left_out(data),
    ]


def _left_out(data: DataSummary) -> list[tuple[str, str]]:
    if not data.skipped:
        return []
    return [("left out", f"{words.count(data.skipped)} unreadable, the first: {data.skipped_first[0]}")]


def environment_facts(environment: Environment) -> list[tuple[str, str]]:
    return [
        ("device", environment.device),
        ("processor", f"{environment.cpu}, {environment.cores} cores"),
        ("platform", environment.platform),
        (
            "versions",
            f"Python {environment.python}, torch {environment.torch}, diffusers {environment.diffusers}",
        ),
        ("commit", environment.git_commit or "not a checkout"),
    ]
