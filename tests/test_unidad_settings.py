"""What Uni-DAD is built of: options, heads, starting models, precision, and the methods that are settings of it
(unidad.md 2, 3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import assert_same
from few_steps import Roles, differing, factor, source, unidad, weights
from torch import Tensor, nn

from diffstill.diffusion.levels import signal_and_noise
from diffstill.errors import InputError
from diffstill.methods.unidad_options import UniDadOptions
from diffstill.models.denoiser import Denoiser


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target_teacher": "none", "target_weight": 0.5}, "target_weight 0.5 needs a target teacher"),
        ({"target_weight": 0.0}, "the target teacher would never be asked"),
        ({"dmd_weight": 0.0}, "the target teacher would never be asked"),
        ({"dmd_weight": 0.0, "gan": "none", "target_teacher": "none"}, "nothing would train the student"),
        ({"gan_share": 0.5, "gan": "none"}, "gan_share balances the gan"),
        ({"target_weight": 1.01}, "less than or equal to 1"),
        ({"target_weight": -0.1}, "greater than or equal to 0"),
        ({"dmd_weight": 0.0, "gan_weight": 0.0, "target_teacher": "none"}, "nothing would train the student"),
        ({"guidance": float("inf")}, "guidance\n.*finite number"),
        ({"sigma_end": float("nan")}, "sigma_end\n.*finite number"),
        *(({"taps": taps}, "give all, blocks, last, how many of the last") for taps in (0, True, [], ())),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        UniDadOptions.model_validate(options)


def test_what_does_not_fit_the_networks_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match=r"^method\.target_teacher: 'frozen' has no model; name the finished model"):
        unidad(target_teacher="frozen")
    with pytest.raises(InputError, match=r"^method\.taps: 'middle' .*use of in, down\.0\.0, "):
        unidad(taps=("middle",))
    with pytest.raises(InputError, match=r"^method\.gan: 'bce' needs an encoder"):
        unidad(factor(1.0))
    with pytest.raises(InputError, match=r"^method\.sigma_min and sigma_max: '30 and 10' leave no levels between them"):
        unidad(sigma_min=30.0)
    with pytest.raises(InputError, match=r"^method\.sigma_end: 12.0 does not lie below sigma_max 10 "):
        unidad(sigma_end=12.0, steps=2)
    with pytest.raises(InputError, match=r"^roles\.target_teacher: 'a model' would never be asked"):
        unidad(initial={"target_teacher": source()}, target_teacher="none")


@pytest.mark.parametrize(
    ("taps", "names"),
    [
        ("all", ("in", "down.0.0", "down.0.down", "down.1.0", "mid")),
        ("last", ("mid",)),
        (2, ("down.1.0", "mid")),
        (99, ("in", "down.0.0", "down.0.down", "down.1.0", "mid")),
        (("mid", "in"), ("in", "mid")),
    ],
)
def test_heads_sit_where_the_options_say(taps: Any, names: tuple[str, ...]) -> None:
    method = unidad(taps=taps)
    assert method._taps == method.roles["heads"].names == names
    assert len(method.roles["heads"].layers) == len(names)


def test_roles_start_from_the_teacher_or_from_what_the_recipe_names() -> None:
    teacher = source()
    method = unidad(teacher)
    for role in ("student", "critic", "target_teacher"):
        mine = weights(method.roles[role])
        assert all(torch.equal(mine[name], value) for name, value in weights(teacher).items())
        assert all(p.requires_grad for p in method.roles[role].parameters())
    networks = [*method.roles.values(), method.teacher.network]
    assert len({id(p) for n in networks for p in n.parameters()}) == sum(len(list(n.parameters())) for n in networks)
    started = {role: differing(teacher, i).freeze() for i, role in enumerate(("student", "critic", "target_teacher"))}
    method = unidad(teacher, started)
    for role, model in started.items():
        mine = weights(method.roles[role])
        assert all(torch.equal(mine[name], value) for name, value in weights(model).items())
        assert all(p.requires_grad for p in method.roles[role].parameters()), "though the finished model is frozen"


# ----------------------------------------------------------------------------------------------- settings of it

SINGLE: dict[str, Any] = {"taps": "last", "head": "conv", "steps": 2, "student_every": 2}


def test_all_weight_on_a_finished_target_teacher_is_distillation_of_it(tmp_path: Path) -> None:
    """FT-DMD2: fine-tune, then DMD2 of what came out. Losses and weights of a short run are equal bit for bit."""
    teacher = source()
    tuned = differing(teacher, 5)
    started = dict.fromkeys(("student", "critic", "target_teacher"), tuned)
    one = Roles(teacher, started, target_teacher="frozen", target_weight=1.0, **SINGLE)
    two = Roles(tuned, target_teacher="none", **SINGLE)
    methods: list[Any] = [bench.method() for bench in (one, two)]
    moved = differing(teacher, 6)
    for method in methods:
        method.roles["student"].load_state_dict(moved.network.state_dict())
    for number in range(3):
        for phase in ("student", "critic"):
            first, second = (m.phase_loss(phase, one.batch(number * 8), None) for m in methods)
            assert torch.equal(first.total, second.total)
            assert_same(first.parts, second.parts)
    assert first.total.item() > 0
    ends = []
    for bench, name in ((one, "one"), (two, "two")):
        trainer = bench.trainer(tmp_path / name)
        trainer.run()
        ends.append(trainer.arms[0].tensors())
    assert_same(*ends)


def test_dmd2_has_one_head_of_its_own_on_the_bottleneck() -> None:
    bench = Roles(source(), target_teacher="none", gradient="random", **SINGLE)
    method: Any = bench.method()
    assert set(method.roles) == {"student", "critic", "heads"}
    assert [phase.roles for phase in method.phases] == [("student",), ("critic", "heads")]
    heads = method.roles["heads"]
    assert heads.names == ("mid",)
    assert sum(isinstance(m, nn.Conv2d) for m in heads.modules()) == 3
    method.roles["student"].load_state_dict(differing(source(), 3).network.state_dict())
    losses = bench.loss(method, bench.batch())
    assert {"dmd", "gan", "critic", "gan_critic"} <= set(losses.parts)
    assert bool(losses.total.isfinite())
    for aggregation in ("sum", "logit"):  # of one head's one logit: all the same
        other: Any = Roles(
            source(), target_teacher="none", gradient="random", aggregation=aggregation, **SINGLE
        ).method()
        other.roles["student"].load_state_dict(method.roles["student"].state_dict())
        torch.testing.assert_close(bench.loss(other, bench.batch()).total, losses.total)


# ---------------------------------------------------------------------------------------------------- precision


def estimates(exact: bool) -> tuple[Tensor, Tensor]:
    """Clean estimates at the ratio 80 under bf16, and those of the last layer in float64 from the same features."""
    model = source(widths=(16, 32))
    made = model.with_network(model.network.eval())
    made.exact_output, made.autocast_dtype = exact, torch.bfloat16
    seen: list[Tensor] = []
    network: Any = made.network
    network.conv_out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    alpha, sigma = signal_and_noise(torch.tensor([80.0], dtype=torch.float64))
    x_t = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t, labels = torch.full((16,), 930), torch.arange(16) % 3
    with torch.no_grad():
        out = made(x_t, t, labels)
        layer = network.conv_out
        eps = nn.functional.conv2d(seen[0].double(), layer.weight.double(), layer.bias.double(), padding=1)
    assert out.dtype == torch.float32
    return (x_t - sigma * out.double()) / alpha, (x_t - sigma * eps) / alpha


def test_the_clean_estimate_at_high_noise_does_not_feel_bf16s_rounding() -> None:
    errors = {}
    for exact in (False, True):
        mine, wanted = estimates(exact)
        errors[exact] = float((mine - wanted).square().mean().sqrt())
    assert errors[True] < 1e-3
    assert errors[False] > 0.02


@pytest.mark.parametrize("where", ["matching", "chain"])
def test_the_losses_estimate_in_float32_too(where: str) -> None:
    """What the method makes of a prediction, at the ratio 80: bf16's rounding, times 80, would be an error of .1."""
    bench = Roles(source(widths=(16, 32)), steps=1, sigma_max=80.0)
    method: Any = bench.method()
    for model in method.denoisers():
        model.network.eval()
        model.autocast_dtype = torch.bfloat16
    batch = bench.batch()
    alpha, sigma = (v.view(1, 1, 1, 1) for v in signal_and_noise(torch.tensor([80.0], dtype=torch.float64)))
    model, x_t = method.teacher, torch.randn(batch.x0.shape, generator=torch.Generator().manual_seed(0))
    if where == "chain":
        model, x_t = method.student, sigma * batch.normal("chain 0")
    seen: list[Tensor] = []
    layer: Any = model.network.conv_out
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        if where == "chain":
            found = method.unroll(batch)
        else:
            t = torch.full((len(x_t),), 930)
            found = method._x0(model, x_t, t, batch.labels, alpha.float(), sigma.float())
        eps = nn.functional.conv2d(seen[0].double(), layer.weight.double(), layer.bias.double(), padding=1)
    wanted = (x_t - sigma * eps) / alpha
    assert found.dtype == torch.float32
    assert float((found - wanted).square().mean().sqrt()) < 1e-3


def test_exact_output_is_for_autocast_alone_and_leaves_no_hook() -> None:
    model = source()
    network: Any = model.network.eval()
    inputs = torch.randn(4, 1, 8, 8), torch.full((4,), 500), torch.zeros(4, dtype=torch.int64)
    plain = model(*inputs)
    model.exact_output = True
    assert torch.equal(model(*inputs), plain)
    model.autocast_dtype = torch.bfloat16
    model(*inputs).sum().backward()
    assert network.conv_out.weight.grad.abs().sum() > 0
    network.mid_block.forward = None
    with pytest.raises(TypeError):
        model(*inputs)
    assert not any(module._forward_hooks for module in network.modules())


def test_every_network_runs_in_training_precision_with_an_exact_output(tmp_path: Path) -> None:
    bench = Roles(source(), steps=2, student_every=1)
    trainer = bench.trainer(tmp_path, precision="bf16", steps=2)
    method: Any = trainer.arms[0].method
    models: list[Denoiser] = [method.student, method.critic, method.teacher, method._target]
    assert [(m.autocast_dtype, m.exact_output) for m in models] == [(torch.bfloat16, True)] * 4
    trainer.run()
    student = trainer.arms[0].student
    assert (student.autocast_dtype, student.exact_output, student.sampler) == (None, True, "renoise")
