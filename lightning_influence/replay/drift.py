"""What is found to differ where a replay leaves the run."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version

from torch import Tensor, nn

from lightning_influence.replay.passes import Passes
from lightning_influence.replay.plan import Plan, PlannedStep, State
from lightning_influence.run.lightning_names import overrides
from lightning_influence.run.moment import numbers_of

_SAME = 1e-5  # relative
_HOOKS = ("on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping", "optimizer_step")
"""Hooks of a module in which gradients or parameters may be changed, and which a replay does not call."""


def difference(passes: Passes, plan: Plan, planned: PlannedStep, state: State) -> str:
    """What differs, found at a step whose gradient is another than in the run, as sentences."""
    differences = [
        *_not_repeatable(passes, planned, state),
        *_other_numbers(passes.module, planned),
        *_changes_of_gradients(passes.module),
        *_other_versions(plan),
    ]
    return " ".join(differences) if differences else _nothing_found(passes.module)


def difference_on_arrival(
    passes: Passes, plan: Plan, planned: PlannedStep, before: State, arrived: State, expected: State
) -> str:
    """What differs in the state after some steps, found at the last of them."""
    missed = {k: _distance(arrived.parameters[k], p) for k, p in expected.parameters.items()}
    most = max(missed, key=missed.__getitem__)
    where = f"Most of it is in {most}."
    buffers = [
        k for k, b in expected.buffers.items() if k in arrived.buffers and _distance(arrived.buffers[k], b) > _SAME
    ]
    if buffers:
        return (
            f"{where} The buffer {buffers[0]} is another than in the run: a hook or a callback writes to it. Write it inside "
            "training_step."
        )
    return f"{where} {difference(passes, plan, planned, before)}"


def _not_repeatable(passes: Passes, planned: PlannedStep, state: State) -> Iterator[str]:
    one, other = passes.whole(planned, state).gradients, passes.whole(planned, state).gradients
    apart = {k: _distance(one[k], other[k]) for k in one}
    worst = max(apart, key=apart.__getitem__)
    if apart[worst] > _SAME:
        yield (
            f"The step, replayed twice, gives two gradients of {worst}, {apart[worst]:.2g} of its size apart: an operation is not "
            "deterministic, or reads what changes from call to call. Train and replay with torch.use_deterministic_algorithms(True)."
        )


def _other_numbers(module: nn.Module, planned: PlannedStep) -> Iterator[str]:
    present = numbers_of(module)
    for key in planned.micro_batches[0].moment.numbers:
        if key not in present:
            yield (
                f"The run recorded {key.strip(':').replace(':', '.')}, a number that the module given does not have. Give a module "
                "made as that of the run was."
            )
            return


def _changes_of_gradients(module: nn.Module) -> Iterator[str]:
    hooked = [name for name, p in module.named_parameters() if p._backward_hooks]
    if hooked:
        yield f"A hook on {hooked[0]} changes its gradient, which a replay does not call. Train without it."
    own = [name for name in _HOOKS if overrides(module, name)]
    if own:
        yield (
            f"{type(module).__name__}.{own[0]} is overridden, which a replay does not call: if it changes gradients, let the "
            "trainer clip, or put the change into the loss."
        )


def _other_versions(plan: Plan) -> Iterator[str]:
    recorded: Mapping[str, str] = getattr(plan, "versions", {})
    for package, then in recorded.items():
        try:
            installed = platform.python_version() if package == "python" else version(package)
        except PackageNotFoundError:
            continue
        if installed != then:
            yield f"The run had {package} {then}, and here is {installed}. Replay with the versions of the run."


def _nothing_found(module: nn.Module) -> str:
    """Parameters, buffers, optimizer state, batches and random states are those of the run; what is left are attributes."""
    attributes = sorted({name for m in module.modules() for name in _unrecorded(m)})
    examples = f", such as its attributes {', '.join(attributes)[:200]}" if attributes else ""
    return (
        "Parameters, buffers, batch and random state are those of the run, and the step gives the same when it is replayed twice. So "
        f"training_step reads something else that was not recorded{examples}, or its code has changed since. Keep what changes while "
        "training in a buffer (register_buffer) that training_step itself writes."
    )


def _unrecorded(module: nn.Module) -> Iterator[str]:
    """Attributes in which a module keeps tensors, dicts or lists of its own."""
    for name, value in vars(module).items():
        if not name.startswith("_") and isinstance(value, (Tensor, dict, list)):
            yield name


def _distance(a: Tensor, b: Tensor) -> float:
    """Relative to the second."""
    a, b = a.detach().double(), b.detach().double().to(a.device)
    return float((a - b).norm() / b.norm().clamp(min=1e-30)) if a.shape == b.shape else float("inf")
