"""``diffstill list``."""

from __future__ import annotations

from ..methods import METHODS
from ..recipe import AnyRecipe, DistillRecipe, builtin_recipes, load_recipe

DATA = [
    ("digits", "scikit-learn's 1,797 grey 8x8 digits, embedded, offline"),
    ("folder:PATH", "images in one sub-folder a class (optionally train/, val/, test/ above)"),
    ("npz:PATH", "uint8 images (NHWC, NCHW or NHW) and labels; several files by comma or glob"),
    ("parquet:PATH", "encoded images and labels (extra [parquet])"),
    ("hub:NAME", "a data set of the hub through `datasets` (extra [data])"),
]
METRICS = [
    ("fd", "Frechet distance in an extractor's features (FD-<data>; FID only for the 2015-12-05 Inception)"),
    ("fd_pixels", "Frechet distance of the pixels themselves, of small images: a second opinion beside fd"),
    ("kid", "kernel distance, polynomial kernel of degree 3, unbiased"),
    ("precision, recall", "improved precision and recall, k = 3"),
    ("class_agreement", "share of samples that the data set's classifier gives the label asked for"),
    ("inception_score", "clear and varied classes: the Inception score with extractor=inception, else its analogue"),
    ("response", "how far samples of equal noise move in features as the guidance scale turns"),
    ("ratio, cosine, gap_mse", "guidance fidelity: the student's gap against the teacher's at the same (x_t, t, y)"),
    ("cond_mse, null_mse, best_rescale", "each branch against the teacher's; the best scalar correction of the gap"),
    ("encoding", "of an encoder: the error of images that were encoded and decoded again, and its noise"),
    ("diversity, diversity_share", "few-shot: mean distance of pairs within the nearest shots' clusters; of the real"),
    ("memorised, nearest_ratio", "few-shot: samples that lie as near to a shot as 5 % of real images; mean distance"),
    ("source_fd", "few-shot: Frechet distance to the source domain's images"),
    ("parameters, flops, nfe, latency, memory", "cost"),
]


def listing(what: str) -> list[dict[str, str]]:
    """``name`` and ``summary`` of each, between them for recipes the ``command`` that takes it."""
    if what == "recipes":
        recipes = [load_recipe(name) for name in builtin_recipes()]
        return [{"name": r.name, "command": command_of(r), "summary": r.description} for r in recipes]
    rows = DATA if what == "data" else METRICS
    if what == "methods":
        rows = [(name, method.summary) for name, method in METHODS.items()]
    return [{"name": name, "summary": line} for name, line in rows]


def command_of(recipe: AnyRecipe) -> str:
    """What a recipe is for: recipes with arms are for ``arena``, though ``distill`` takes their student, too."""
    return "arena" if isinstance(recipe, DistillRecipe) and recipe.arena.arms else recipe.kind
