"""Rules of a method's loss: what it may touch, what it must not depend on, what it is worth on known inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..engine.stream import micro_batches
from ..errors import InputError
from ..methods import METHODS, Method, Options, TeacherOutputs
from ..models.adapters import unwrap
from ..models.denoiser import Denoiser
from ..recipe import MethodSpec
from .bench import Bench, at_timesteps, timesteps_to_try
from .report import Broken, NotApplicable

RELATIVE = 1e-5
"""Allowed relative difference of two float32 losses that are equal in exact arithmetic."""


def gradients(bench: Bench) -> str:
    """Every trainable role gets a gradient; the teacher and frozen modules get none."""
    method = bench.method()
    outside: dict[str, nn.Module] = dict(method.frozen)
    if method.teacher is not None:
        # Thawed for this, so that a loss which reaches the teacher by a way of its own is seen.
        outside["teacher"] = method.teacher.network.requires_grad_(True)
    total = bench.loss(method, bench.batch()).total
    if total.shape != ():
        raise Broken(f"the total is no scalar but has shape {tuple(total.shape)}")
    total.backward()
    for name, module in outside.items():
        if any(p.grad is not None for p in module.parameters()):
            raise Broken(f"{name} received a gradient; it is frozen")
    for role, network in method.roles.items():
        found = [p.grad for p in network.parameters() if p.requires_grad]
        if not found:
            raise Broken(f"role {role} has no trainable parameter; list it in Method.frozen")
        if not any(g is not None and bool(g.any()) for g in found):
            raise Broken(f"role {role} received no gradient")
    return f"trained: {', '.join(method.roles)}"


def phases(bench: Bench) -> str:
    """Of a method with several optimizers: each role is one phase's, each phase reaches its roles and no other, and
    leaves everything as trainable as it was."""
    method = bench.method()
    owners = [role for phase in method.phases for role in phase.roles]
    if sorted(owners) != sorted(method.roles):
        raise Broken(f"the phases train {sorted(owners)}, and the roles are {sorted(method.roles)}")
    if len(method.phases) == 1:
        return "one, of all roles"
    batch, teacher = bench.batch(), method.teacher or bench.teacher()
    asked = {name: [p.requires_grad for p in network.parameters()] for name, network in method.roles.items()}
    for phase in method.phases:
        with method.in_phase(phase):
            method.phase_loss(phase.name, batch, TeacherOutputs(teacher, batch, method.teacher_needs)).total.backward()
        for name, network in method.roles.items():
            reached = any(p.grad is not None and bool(p.grad.any()) for p in network.parameters())
            if reached != (name in phase.roles):
                raise Broken(f"phase {phase.name} {'reached' if reached else 'did not reach'} role {name}")
            if [p.requires_grad for p in network.parameters()] != asked[name]:
                raise Broken(f"phase {phase.name} left {name} with other parameters to train")
            network.zero_grad(set_to_none=True)
    return ", ".join(f"{phase.name} every {phase.every}" for phase in method.phases)


def null_branch(bench: Bench) -> str:
    """The null row of a guided student is trained, or the method says that it is not."""
    method = bench.method()
    if not method.guided:
        raise NotApplicable("the student is sampled without guidance")
    if method.student.takes_scale:
        return _scale_input(bench, method)
    null = method.student.null_label
    rows = [m for m in unwrap(method.student.network).modules() if isinstance(m, nn.Embedding)]
    rows = [m for m in rows if m.num_embeddings == null + 1]
    if not rows:
        raise NotApplicable(f"the student has no label table with {null + 1} rows")
    for number in range(16):  # label dropout is rare: a few batches, until one has it
        bench.loss(method, bench.batch(number * 8)).total.backward()
    reached = any(m.weight.grad is not None and bool(m.weight.grad[null].any()) for m in rows)
    if reached != method.trains_null:
        found = "receives a gradient" if reached else "receives no gradient, so guidance is not trained"
        raise Broken(f"the null row {found}; trains_null says {method.trains_null}")
    return "trained" if reached else "note: the null row stays as it was, guidance is not trained (trains_null = False)"


def _scale_input(bench: Bench, method: Method) -> str:
    """A student whose guidance scale is an input learns what the scale does."""
    bench.loss(method, bench.batch()).total.backward()
    named = unwrap(method.student.network).named_parameters()
    scale = [p for name, p in named if "scale" in name or "cond_proj" in name]
    if not any(p.grad is not None and bool(p.grad.any()) for p in scale):
        raise Broken("no gradient reaches the parameters of the scale input, so guidance is not trained")
    return "the scale is an input, and trained"


def modules(bench: Bench) -> str:
    """Every module the method holds is a role, frozen or the teacher: the engine moves and saves no other."""
    method = bench.method()
    known = [*method.roles.values(), *method.frozen.values(), method.student.network]
    if method.teacher is not None:
        known.append(method.teacher.network)
    inside = {id(part) for module in known for part in unwrap(module).modules()}
    for name, value in vars(method).items():
        held = value.network if isinstance(value, Denoiser) else value
        if isinstance(held, nn.Module) and id(held) not in inside:
            raise Broken(f"self.{name} is neither in self.roles nor in self.frozen: it would stay on the CPU")
        if isinstance(held, Tensor):
            raise Broken(f"self.{name} is a tensor and would stay on the CPU: make it a buffer of a frozen module")
    if method.role_optimizers.keys() != method.roles.keys():
        raise Broken(f"role_optimizers {sorted(method.role_optimizers)} do not match roles {sorted(method.roles)}")
    return f"{len(method.roles)} trained, {len(method.frozen)} frozen"


def copy_of_teacher(bench: Bench) -> str:
    """A student that is an exact copy of the teacher, in eval mode, gives the parts their known values."""
    try:
        method = bench.method(student=bench.teacher().with_network(_thawed(bench.teacher().network)))
    except InputError as error:
        raise NotApplicable(f"the student cannot be a copy of the teacher ({error})") from None
    if not method.copy_parts:
        raise NotApplicable("the method names no known values (copy_parts)")
    method.student.network.eval()
    parts = bench.loss(method, bench.batch()).parts
    for name, value in method.copy_parts.items():
        if name not in parts:
            raise Broken(f"there is no part {name!r}; the parts are {', '.join(parts)}")
        if not abs(float(parts[name]) - value) <= 1e-6:
            raise Broken(f"{name} is {float(parts[name]):.3g}, not {value:g}")
    return ", ".join(f"{name} = {value:g}" for name, value in method.copy_parts.items())


def _thawed(network: nn.Module) -> nn.Module:
    return network.requires_grad_(True).train()


def finite(bench: Bench) -> str:
    """The loss is finite at every timestep, the first and the last included."""
    method = bench.method()
    stamps = timesteps_to_try(method.student)
    size = min(100, len(stamps))
    batch = bench.batch(size=size)
    with torch.no_grad():
        for start in range(0, len(stamps), size):
            part = stamps[torch.arange(start, start + size) % len(stamps)]
            if not bool(bench.loss(method, at_timesteps(batch, part, method.schedule)).total.isfinite()):
                bad = [int(t) for t in part if not _finite_at(bench, method, t)]
                raise Broken(f"the loss is not finite at t = {bad[:5]}")
    return f"{len(stamps)} of {method.schedule.T} timesteps"


def _finite_at(bench: Bench, method: Method, t: Tensor) -> bool:
    batch = at_timesteps(bench.batch(size=1), t.view(1), method.schedule)
    return bool(bench.loss(method, batch).total.isfinite())


def order(bench: Bench) -> str:
    """The order of the samples in the batch does not matter."""
    method, batch = bench.method(), bench.batch()
    shuffled = torch.arange(batch.size).flip(0)

    def uniform(name: str, whole_batch: bool = False) -> Tensor:
        drawn: Tensor = batch.uniform(name, whole_batch=whole_batch)
        return drawn if whole_batch else drawn[shuffled]

    def normal(name: str) -> Tensor:
        return batch.normal(name)[shuffled]

    other = replace(
        batch,
        **{name: getattr(batch, name)[shuffled] for name in ("x0", "labels", "t", "noise", "x_t", "t_global")},
        uniform=uniform,
        normal=normal,
        memo={},
    )
    return _equal(bench.loss(method, batch).total, bench.loss(method, other).total, "shuffled")


def deterministic(bench: Bench) -> str:
    """The loss is a function of the batch: it draws no random numbers of its own."""
    method, batch = bench.method(), bench.batch()
    found = []
    with torch.random.fork_rng(devices=[]):
        for seed in (0, 1):
            torch.manual_seed(seed)
            found.append(bench.loss(method, batch).total.detach())
    if not torch.equal(*found):
        raise Broken(f"{float(found[0]):.9g} and {float(found[1]):.9g} for one batch; draw with batch.uniform(name)")
    return "bit-identical"


def halves(bench: Bench) -> str:
    """The loss of a batch, and its gradient, is the mean over its micro-batches (so over processes too)."""
    method, batch = bench.method(), bench.batch()
    totals, slopes = [], []
    for parts in ([batch], micro_batches(batch, batch.size // 2)):
        loss = torch.stack([bench.loss(method, part).total for part in parts]).mean()
        loss.backward()
        trained = [p for network in method.roles.values() for p in network.parameters() if p.grad is not None]
        totals.append(loss.detach())
        slopes.append(torch.cat([p.grad.flatten() for p in trained if p.grad is not None]))
        for parameter in trained:
            parameter.grad = None
    if slopes[0].shape != slopes[1].shape or (slopes[0] - slopes[1]).norm() > 1e-4 * slopes[0].norm():
        raise Broken("the gradient of the batch is not the mean over its halves; normalise sample by sample")
    return _equal(totals[0], totals[1], "mean of two halves")


def hooks(bench: Bench) -> str:
    """No hook stays on a network after the loss, also after an exception in it."""
    method = bench.method()
    networks = {"student": method.student.network}
    if method.teacher is not None:
        networks["teacher"] = method.teacher.network
    bench.loss(method, bench.batch())
    _no_hooks(networks, "the loss")
    for name in networks if method.teacher_needs else ("student",):
        with _failing(networks[name]):
            try:
                bench.loss(method, bench.batch())
            except _Deliberate:
                pass
            else:
                raise NotApplicable(f"the loss never called the {name}")
        _no_hooks(networks, f"an exception in the {name}")
    return "none left"


class _Deliberate(Exception):
    """Raised inside a network to see what the method leaves behind."""


@contextmanager
def _failing(network: nn.Module) -> Iterator[None]:
    def fail(*args: object) -> None:
        raise _Deliberate

    handle = network.register_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def _no_hooks(networks: dict[str, nn.Module], after: str) -> None:
    for name, network in networks.items():
        for path, module in unwrap(network).named_modules():
            if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
                raise Broken(f"a hook is left on {name}.{path} after {after}")


def options(bench: Bench) -> str:
    """Options survive the way through a recipe, and unknown ones are refused."""
    method = bench.method_class
    if METHODS.get(method.name) is not method:
        raise Broken(f"recipes do not know {method.name!r}; decorate the class with @register")
    if not issubclass(method.options_class, Options):
        raise Broken(f"options_class {method.options_class.__name__} is no subclass of Options")
    plain = bench.options.model_dump(mode="json")
    again = MethodSpec(name=method.name, **plain).build_options()
    if again != bench.options or again.model_dump(mode="json") != plain:
        raise Broken(f"{plain} came back as {again.model_dump(mode='json')}")
    try:
        MethodSpec(name=method.name, **{"no_such_option": 1})
    except ValueError as error:
        if "no_such_option" in str(error):
            return f"{len(plain)} options"
    raise Broken("an unknown option is not refused by name")


def _equal(a: Tensor, b: Tensor, what: str) -> str:
    first, second = float(a.detach()), float(b.detach())
    if not abs(first - second) <= RELATIVE * max(1.0, abs(first)):
        raise Broken(f"the loss is {first:.7g}, {what}: {second:.7g}")
    return f"{first:.6g} either way"
