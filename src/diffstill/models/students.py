"""Students that begin as a part of their teacher: fewer channels, fewer layers (U-Nets of diffusers' ``UNet2DModel``).

A student's weights are slices of the teacher's, chosen so that the pruned network is a consistent sub-network: one set
of kept channels for each residual stream, the same set wherever that stream is read, also in the decoder, whose
convolutions read the concatenation of a hidden stream and a skip stream, each with its own set.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from ..errors import InputError
from .adapters import family_of, unwrap
from .adapters.unet2d import build

Select = Literal["first", "magnitude"]

MUST_EQUAL = (
    "in_channels",
    "out_channels",
    "num_class_embeds",
    "class_embed_type",
    "attn_norm_num_groups",
    "act_fn",
    "center_input_sample",
    "time_embedding_type",
    "freq_shift",
    "flip_sin_to_cos",
    "downsample_padding",
    "downsample_type",
    "upsample_type",
    "mid_block_type",
    "mid_block_scale_factor",
    "add_attention",
    "resnet_time_scale_shift",
)
SCALE_OPTIONS = ("guidance_embed_dim", "guidance_embed_type")
OPTIONS = "build teacher and student from the options of the unet2d family"
SCALE = "class_embedding.scale.weight"
"""The projection of the guidance scale, in networks that take it."""
BLOCK_TYPES = {"DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"}
# Convolutions (and the attention's output) whose result is added to, or becomes, a level's residual stream.
STREAM_WRITERS = ("conv_in.weight", "conv2.weight", "conv_shortcut.weight", "to_out.0.weight", "samplers.0.conv.weight")


@dataclass(frozen=True)
class Inheritance:
    """What a student took from its teacher."""

    select: Select
    parameters: int
    teacher_parameters: int
    channels: tuple[Tensor, ...]
    """The kept channels of each level's residual stream, ascending."""
    left_out: tuple[str, ...]
    """Tensors of the teacher from which nothing was taken: dropped layers and attentions."""

    def __str__(self) -> str:
        share = self.parameters / self.teacher_parameters
        return f"{self.parameters:,} of {self.teacher_parameters:,} parameters ({share:.1%}), channels by {self.select}"


def inherit(teacher: nn.Module, student: nn.Module, *, select: Select = "first") -> Inheritance:
    """Overwrites the student's weights with a slice of the teacher's; the teacher is only read.

    Widths: ``first`` keeps the first channels of every residual stream and hidden layer, ``magnitude`` those whose
    incoming filters have the largest L1 norm (structured magnitude pruning, Li et al., 1608.08710; summed over all
    layers that write into a stream). Where group sizes allow, channels are chosen group by group, so that a group of
    the student's GroupNorm lies inside one of the teacher's. Queries are scaled by sqrt(d/D), which keeps the
    attention logits what the kept channels made of them. Sinusoidal time features go to the nearest frequency.

    Depth: a student with fewer ``layers_per_block`` keeps the first layers of every level; in the decoder the first
    ones and the last, which alone reads the skip of the next finer level. So a dropped layer counts as the identity.

    Raises:
        InputError: for other families, or a student that is wider, deeper, or has another vocabulary than the teacher.
    """
    big, small = unwrap(teacher), unwrap(student)
    _check(big, small)
    with torch.no_grad():
        return _Transplant(big, small, select).run()


def _check(big: Any, small: Any) -> None:
    for role, network in (("teacher", big), ("student", small)):
        if not isinstance(network, UNet2DModel):
            problem = "cannot inherit" if role == "student" else "cannot be inherited from"
            raise InputError(role, family_of(network).name, "use unet2d, or a fresh student", problem=problem)
    old, new = big.config, small.config

    def refuse(name: str, mend: str) -> InputError:
        return InputError(f"student.{name}", new[name], mend)

    scale = [name for name in SCALE_OPTIONS if name in old and name in new]
    for name in (*MUST_EQUAL, *scale):
        if old[name] != new[name]:
            raise refuse(name, f"to inherit, it must equal the teacher's {old[name]}")
    widths, limits = new.block_out_channels, old.block_out_channels
    if len(widths) != len(limits):
        raise refuse("block_out_channels", f"to inherit, give {len(limits)} levels as the teacher's {list(limits)}")
    if any(c > C for c, C in zip(widths, limits, strict=True)):
        mend = f"it is wider than the teacher's {list(limits)}: to inherit, stay within them, or use student.init=fresh"
        raise refuse("block_out_channels", mend)
    if widths[0] % 2:
        raise refuse("block_out_channels", "to inherit, give an even first width")
    if new.layers_per_block > old.layers_per_block:
        raise refuse("layers_per_block", f"to inherit, stay within the teacher's {old.layers_per_block}")
    for name in ("down_block_types", "up_block_types"):
        if not BLOCK_TYPES.issuperset([*new[name], *old[name]]) or old.resnet_time_scale_shift != "default":
            raise refuse(name, f"only {', '.join(sorted(BLOCK_TYPES))} can inherit")
        if any("Attn" in n and "Attn" not in o for n, o in zip(new[name], old[name], strict=True)):
            raise refuse(name, f"to inherit, put attention only where the teacher has it: {list(old[name])}")


def keep_channels(score: Tensor, count: int, groups: int = 1, kept_groups: int = 1) -> Tensor:
    """Indices (count,) int64, ascending, of the channels to keep among ``score`` (C,): the highest scores.

    ``groups`` and ``kept_groups`` are the numbers of normalisation groups before and after. Where the sizes nest,
    the best channels of the best groups are taken, so that every kept group comes from one group alone.
    """
    n = min(groups, kept_groups)
    size, kept_size = len(score) // groups, count // kept_groups
    nests = count % n == 0 and count // n <= size and (count // n) % kept_size == 0
    if not nests:
        n, groups, size = 1, 1, len(score)
    best = score.reshape(groups, size).sort(dim=1, descending=True, stable=True)
    values, members = best.values[:, : count // n], best.indices[:, : count // n]
    chosen = values.sum(1).sort(descending=True, stable=True).indices[:n]
    return (members + size * torch.arange(groups)[:, None])[chosen].flatten().sort().values


class _Transplant:
    """One operation: the teacher's tensors, the student's, and the channels kept in each stream."""

    def __init__(self, big: Any, small: Any, select: Select) -> None:
        self.big, self.small, self.select = big, small, select
        self.old = {name: tensor.detach().cpu() for name, tensor in big.state_dict().items()}
        self.new = small.state_dict()
        self.read: set[str] = set()
        self.written: set[str] = set()
        self.groups = (big.config.norm_num_groups, small.config.norm_num_groups)
        self.widths = tuple(big.config.block_out_channels)
        self.levels = self._streams()
        self.temb = self._best(["time_embedding.linear_2.weight"], len(self.new["time_embedding.linear_2.bias"]))

    def run(self) -> Inheritance:
        self._embeddings()
        self._layer("conv_in", self.levels[0], None)
        self._encoder()
        self._block("mid_block", self.small.mid_block, self.levels[-1])
        self._decoder()
        self._norm("conv_norm_out", self.levels[0])
        self._layer("conv_out", None, self.levels[0])
        if fresh := sorted(self.new.keys() - self.written):
            raise InputError("student", fresh[0], OPTIONS, problem="cannot be inherited")
        return Inheritance(
            self.select,
            sum(tensor.numel() for tensor in self.new.values()),
            sum(tensor.numel() for tensor in self.old.values()),
            tuple(self.levels),
            tuple(sorted(self.old.keys() - self.read)),
        )

    # ---- which channels

    def _best(self, writers: list[str], count: int, groups: tuple[int, int] = (1, 1)) -> Tensor:
        """The channels to keep of a stream or hidden layer that the named weights write into."""
        total = len(self.old[writers[0]])
        if self.select == "first":
            return keep_channels(-torch.arange(total).double(), count, *groups)
        score = torch.stack([self.old[name].double().abs().flatten(1).sum(1) for name in writers]).sum(0)
        return keep_channels(score, count, *groups)

    def _streams(self) -> list[Tensor]:
        """The kept channels of every level. Neighbouring levels of equal width are one stream: no shortcut between."""
        new_widths = self.small.config.block_out_channels
        runs: list[list[int]] = []
        for level in range(len(self.widths)):
            tied = level and (self.widths[level], new_widths[level]) == (self.widths[level - 1], new_widths[level - 1])
            runs[-1].append(level) if tied else runs.append([level])
        levels: list[Tensor] = []
        for run in runs:
            writers = [name for level in run for name in self._writers(level)]
            levels += [self._best(writers, new_widths[run[0]], self.groups)] * len(run)
        return levels

    def _writers(self, level: int) -> list[str]:
        last = len(self.widths) - 1
        homes = [f"down_blocks.{level}.", f"up_blocks.{last - level}."]
        homes += ["conv_in."] if level == 0 else []
        homes += ["mid_block."] if level == last else []
        return [name for name in self.old if name.startswith(tuple(homes)) and name.endswith(STREAM_WRITERS)]

    # ---- single layers; ``source`` is the teacher's name where it differs

    def _put(self, name: str, tensor: Tensor) -> None:
        if self.new[name].shape != tensor.shape:
            raise InputError("student", name, OPTIONS, problem="does not fit the teacher's")
        self.new[name].copy_(tensor)
        self.written.add(name)

    def _take(self, name: str, *axes: Tensor | None) -> Tensor:
        tensor = self.old[name]
        self.read.add(name)
        for dim, index in enumerate(axes):
            tensor = tensor if index is None else tensor.index_select(dim, index)
        return tensor

    def _layer(
        self, name: str, out: Tensor | None, inp: Tensor | None, source: str | None = None, scale: float = 1.0
    ) -> None:
        source = source or name
        self._put(f"{name}.weight", self._take(f"{source}.weight", out, inp) * scale)
        if f"{name}.bias" in self.new:
            self._put(f"{name}.bias", self._take(f"{source}.bias", out) * scale)

    def _norm(self, name: str, channels: Tensor, source: str | None = None) -> None:
        self._layer(name, channels, None, source)

    # ---- blocks

    def _embeddings(self) -> None:
        name = "time_embedding.linear_1"
        hidden = self._best([f"{name}.weight"], len(self.new[f"{name}.bias"]))
        shift = self.big.config.freq_shift
        self._layer(name, hidden, _nearest_frequencies(self.widths[0], self.new[f"{name}.weight"].shape[1], shift))
        self._layer("time_embedding.linear_2", self.temb, hidden)
        if "class_embedding.weight" in self.new:
            self._put("class_embedding.weight", self._take("class_embedding.weight", None, self.temb))
        if SCALE in self.new:  # a teacher that does not take the scale leaves it without effect
            taken = self._take(SCALE, self.temb) if SCALE in self.old else torch.zeros_like(self.new[SCALE])
            self._put(SCALE, taken)

    def _encoder(self) -> None:
        for level, block in enumerate(self.small.down_blocks):
            name, stream = f"down_blocks.{level}", self.levels[level]
            self._block(name, block, stream, first=self.levels[max(level - 1, 0)])
            if f"{name}.downsamplers.0.conv.weight" in self.new:
                self._layer(f"{name}.downsamplers.0.conv", stream, stream)

    def _block(self, name: str, block: Any, stream: Tensor, first: Tensor | None = None) -> None:
        for j in range(len(block.resnets)):
            inp = first if j == 0 and first is not None else stream
            self._resnet(f"{name}.resnets.{j}", f"{name}.resnets.{j}", inp, stream)
        for j, attention in enumerate(getattr(block, "attentions", None) or []):
            if attention is not None:
                self._attention(f"{name}.attentions.{j}", f"{name}.attentions.{j}", stream)

    def _decoder(self) -> None:
        """Resnets read ``cat(hidden, skip)``: skip channels sit after *all* of the teacher's hidden channels."""
        last_level = len(self.widths) - 1
        for i, block in enumerate(self.small.up_blocks):
            level = last_level - i
            coarser, finer = min(level + 1, last_level), max(level - 1, 0)
            last, last_source = len(block.resnets) - 1, len(self.big.up_blocks[i].resnets) - 1
            for j in range(last + 1):
                source = last_source if j == last else j
                hidden = coarser if j == 0 else level
                skip = self.levels[finer if j == last else level]
                inp = torch.cat([self.levels[hidden], self.widths[hidden] + skip])
                name, origin = f"up_blocks.{i}.resnets.{j}", f"up_blocks.{i}.resnets.{source}"
                self._resnet(name, origin, inp, self.levels[level])
                name, origin = f"up_blocks.{i}.attentions.{j}", f"up_blocks.{i}.attentions.{source}"
                if f"{name}.to_q.weight" in self.new:
                    self._attention(name, origin, self.levels[level])
            name = f"up_blocks.{i}.upsamplers.0.conv"
            if f"{name}.weight" in self.new:
                self._layer(name, self.levels[level], self.levels[level])

    def _resnet(self, name: str, source: str, inp: Tensor, out: Tensor) -> None:
        inner = self._best([f"{source}.conv1.weight"], len(self.new[f"{name}.conv1.bias"]), self.groups)
        self._norm(f"{name}.norm1", inp, f"{source}.norm1")
        self._layer(f"{name}.conv1", inner, inp, f"{source}.conv1")
        self._layer(f"{name}.time_emb_proj", inner, self.temb, f"{source}.time_emb_proj")
        self._norm(f"{name}.norm2", inner, f"{source}.norm2")
        self._layer(f"{name}.conv2", out, inner, f"{source}.conv2")
        shortcut = f"{name}.conv_shortcut"
        if f"{shortcut}.weight" not in self.new:
            return
        if f"{source}.conv_shortcut.weight" in self.old:
            self._layer(shortcut, out, inp, f"{source}.conv_shortcut")
        else:  # the teacher's identity, between two different selections of its channels
            identity = (out[:, None] == inp[None, :]).float()
            self._put(f"{shortcut}.weight", identity[:, :, None, None])
            self._put(f"{shortcut}.bias", torch.zeros(len(out)))

    def _attention(self, name: str, source: str, stream: Tensor) -> None:
        heads = self.big.get_submodule(source).heads, self.small.get_submodule(name).heads
        weights = [f"{source}.{part}.weight" for part in ("to_q", "to_k", "to_v")]
        inner = self._best(weights, len(self.new[f"{name}.to_q.weight"]), heads)
        dims = len(self.old[weights[0]]) // heads[0], len(inner) // heads[1]
        self._norm(f"{name}.group_norm", stream, f"{source}.group_norm")
        # softmax(q.k / sqrt(d)): the student divides by its own d.
        self._layer(f"{name}.to_q", inner, stream, f"{source}.to_q", scale=math.sqrt(dims[1] / dims[0]))
        self._layer(f"{name}.to_k", inner, stream, f"{source}.to_k")
        self._layer(f"{name}.to_v", inner, stream, f"{source}.to_v")
        self._layer(f"{name}.to_out.0", stream, inner, f"{source}.to_out.0")


def _nearest_frequencies(width: int, kept: int, shift: float) -> Tensor:
    """For each sinusoidal feature of a ``kept``-wide time embedding the ``width``-wide one's of nearest frequency.

    Feature k of a half has frequency ``10000^(-k / (half - shift))``; the second half is the other of sin and cos.
    """
    half, kept_half = width // 2, kept // 2
    position = torch.arange(kept_half) / max(kept_half - shift, 1) * max(half - shift, 1)
    index = position.round().long().clamp(max=half - 1)
    return torch.cat([index, half + index])


def student_for_ratio(config: Mapping[str, Any], ratio: float, parameters: int | None = None) -> dict[str, Any]:
    """Recipe options of the largest student with at most ``1/ratio`` of the teacher's parameters.

    Widths are scaled together to multiples of the norm's groups, layers are dropped where that leaves more width;
    the number of groups is halved only where nothing else is small enough.

    Args:
        config: the teacher's ``network.config`` (``UNet2DModel``).
        ratio: how many times smaller, at least 1.
        parameters: the teacher's; None: those of our network of its sizes, which lacks what is foreign in its form.

    Returns:
        Options of the ``unet2d`` family, ready for a recipe's ``student`` section.

    Raises:
        InputError: for a ratio under 1, or one that no student of this shape reaches.
    """
    if not ratio >= 1:
        raise InputError("ratio", ratio, "give a number of at least 1: how many times smaller the student should be")
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    teacher = {
        "block_out_channels": list(config["block_out_channels"]),
        "layers_per_block": config["layers_per_block"],
        "attention_levels": [i for i, name in enumerate(config["down_block_types"]) if "Attn" in name],
        "norm_num_groups": config["norm_num_groups"],
        "attention_head_dim": config["attention_head_dim"],
        "dropout": config["dropout"],
    }

    def count(**options: Any) -> int:
        shape = (config["in_channels"], height, width)
        with torch.device("meta"):
            network = build(sample_shape=shape, num_classes=(config["num_class_embeds"] or 2) - 1, **options)
        return sum(parameter.numel() for parameter in network.parameters())

    whole = count(**teacher) if parameters is None else parameters
    budget = whole / ratio
    groups = config["norm_num_groups"]
    smallest = teacher
    while True:
        unit = math.lcm(groups, config["attention_head_dim"] or 1)
        fitting: list[tuple[int, dict[str, Any]]] = []
        for layers in range(1, config["layers_per_block"] + 1):
            shallow = {**teacher, "layers_per_block": layers, "norm_num_groups": groups}
            candidates = [{**shallow, "block_out_channels": w} for w in _scaled_widths(shallow, unit, 2 * groups)]
            if place := bisect_right(candidates, budget, key=lambda options: count(**options)):
                fitting.append((count(**candidates[place - 1]), candidates[place - 1]))
            smallest = candidates[0] if layers == 1 else smallest
        if fitting:
            return max(fitting, key=lambda item: item[0])[1]
        if groups % 2:
            reach = whole / count(**smallest)
            raise InputError("ratio", ratio, f"give at most {math.floor(reach)}, or a teacher with fewer levels")
        groups //= 2


def _scaled_widths(options: Mapping[str, Any], unit: int, least: int) -> list[list[int]]:
    """All widths scaled by one factor, rounded to multiples of ``unit``, at least ``least``; narrow to wide."""
    widths = options["block_out_channels"]
    steps = max(widths) // unit * 2
    factors = [k / steps for k in range(1, steps + 1)]
    least = -(-least // unit) * unit
    scaled = {tuple(min(c, max(least, round(c * f / unit) * unit)) for c in widths) for f in factors}
    return [list(w) for w in sorted(scaled)]
