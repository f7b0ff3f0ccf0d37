"""The forms that one step of a training loop can have."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .loop_models import TwoHeads
from .world import Unfit, World

Step = Callable[[World, torch.optim.Optimizer, int], list[Any]]
"""Runs one step with a seed; returns the numbers that it computed."""

STEPS: dict[str, Step] = {}


def _step(name: str) -> Callable[[Step], Step]:
    def register(step: Step) -> Step:
        STEPS[name] = step
        return step

    return register


class Interrupted(Exception):
    """Raised in the middle of a step by the loop itself."""


@contextlib.contextmanager
def _autocast(world: World) -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16, enabled=world.autocast):
        yield


def forward(world: World, seed: int, batch: int | None = None) -> Tensor:
    """One forward and its loss."""
    sample = world.change_sample(world.case.sample(seed, batch or world.batch))
    with _autocast(world):
        return loss_of(world, world.call(**sample))


def loss_of(world: World, output: Any) -> Tensor:
    if world.loss is not None:
        return world.loss(output)
    return output.loss


@_step("plain")
def plain(world: World, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad()
    loss = forward(world, seed)
    loss.backward()
    optimizer.step()
    return [loss]


@_step("gradients set to zero, not to None")
def _zeroed(world: World, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad(set_to_none=False)
    loss = forward(world, seed)
    loss.backward()
    optimizer.step()
    return [loss]


@_step("zero_grad after forward")
def _zero_after(world: World, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    loss = forward(world, seed)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return [loss]


@_step("accumulated over two")
def _accumulated(world: World, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad()
    losses = []
    for i in range(2):
        loss = forward(world, seed + 500 * i)
        (loss / 2).backward()
        losses.append(loss)
    optimizer.step()
    return losses


@_step("two forwards, one backward")
def _two_forwards(world: World, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad()
    first, second = forward(world, seed), forward(world, seed + 500)
    (first + second).backward()
    optimizer.step()
    return [first, second]


@_step("two forwards, backwards crossed")
def _crossed(world: World, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad()
    first, second = forward(world, seed), forward(world, seed + 500)
    first.backward()
    second.backward()
    optimizer.step()
    return [first, second]


@_step("two backwards of one forward")
def _two_backwards(world: World, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad()
    loss = forward(world, seed)
    loss.backward(retain_graph=True)
    (2 * loss).backward()
    optimizer.step()
    return [loss]


@_step("a second backward without retain_graph")
def _freed(world: World, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad()
    loss = forward(world, seed)
    loss.backward()
    loss.backward()
    return [loss]


@_step("a backward for each of two losses")
def _separate(world: World, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad()
    sample = world.change_sample(world.case.sample(seed, world.batch))
    with _autocast(world):
        output = world.call(**sample)
        if isinstance(world.model, TwoHeads):
            losses = [output.main.pow(2).mean(), output.side.pow(2).mean()]
        else:
            loss = loss_of(world, output)
            losses = [loss * 0.5, loss * 0.25]
    losses[0].backward(retain_graph=True)
    losses[1].backward()
    optimizer.step()
    return losses


@_step("gradients by autograd.grad")
def _grad(world: World, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad()
    loss = forward(world, seed)
    parameters = [p for p in world.model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    for p, g in zip(parameters, grads, strict=True):
        p.grad = g
    optimizer.step()
    return [loss]


@_step("gradients of some parameters only")
def _some(world: World, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad()
    loss = forward(world, seed)
    loss.backward(inputs=[p for p in world.model.parameters() if p.requires_grad][:2])
    optimizer.step()
    return [loss]


@_step("a gradient penalty")
def _penalty(world: World, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad()
    loss = forward(world, seed)
    parameters = [p for p in world.model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    penalty = torch.stack([g.pow(2).sum() for g in grads if g is not None]).sum()
    (loss + 0.1 * penalty).backward()
    optimizer.step()
    return [loss, penalty]


@_step("a gradient penalty by the input")
def _input_penalty(world: World, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    if world.case.loss is None:
        raise Unfit("tokens")
    optimizer.zero_grad()
    sample = world.change_sample(world.case.sample(seed, world.batch))
    sample["x"] = sample["x"].detach().requires_grad_()
    with _autocast(world):
        loss = loss_of(world, world.call(**sample))
    (g,) = torch.autograd.grad(loss, sample["x"], create_graph=True)
    (loss + g.pow(2).sum()).backward()
    optimizer.step()
    return [loss, g]


@_step("no_grad")
def _no_grad(world: World, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    with torch.no_grad():
        return [forward(world, seed)]


@_step("inference_mode")
def _inference(world: World, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    with torch.inference_mode():
        return [forward(world, seed).clone()]


@_step("evaluated in between")
def _evaluated(world: World, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    world.model.eval()
    with torch.no_grad():
        score = forward(world, seed, batch=3)
    world.model.train()
    return [score, *plain(world, optimizer, seed)]


@_step("trained in eval mode")
def _eval_training(world: World, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    world.model.eval()
    try:
        return plain(world, optimizer, seed)
    finally:
        world.model.train()


@_step("no backward")
def _no_backward(world: World, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    return [forward(world, seed)]


@_step("an exception in the loss")
def _exception_loss(world: World, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad()
    with contextlib.suppress(Interrupted):
        forward(world, seed)
        raise Interrupted
    return plain(world, optimizer, seed)


def _with_hook(world: World, seed: int, error: type[BaseException]) -> None:
    def stop(g: Tensor) -> None:
        raise error("stopped in the backward pass")

    parameter = next(p for p in world.model.parameters() if p.requires_grad)
    handle = parameter.register_hook(stop)
    try:
        forward(world, seed).backward()
    finally:
        handle.remove()


@_step("an exception in the backward pass")
def _exception_backward(world: World, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad()
    with contextlib.suppress(Interrupted):
        _with_hook(world, seed, Interrupted)
    optimizer.zero_grad()  # which gradients are there by then nobody promises
    return [torch.get_rng_state()]


@_step("Ctrl-C in the backward pass")
def _ctrl_c(world: World, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad()
    with contextlib.suppress(KeyboardInterrupt):
        _with_hook(world, seed, KeyboardInterrupt)
    optimizer.zero_grad()
    return [torch.get_rng_state()]


@_step("a wrong argument")
def _wrong(world: World, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    with contextlib.suppress(TypeError):
        world.call(nothing_of_this_name=1)
    return plain(world, optimizer, seed)


@_step("a closure, twice")
def _closure(world: World, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = forward(world, seed)
        loss.backward()
        return loss

    closure()
    loss = optimizer.step(closure)
    return [loss]


@_step("gradients clipped")
def _clipped(world: World, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad()
    loss = forward(world, seed)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(world.model.parameters(), 0.01)
    optimizer.step()
    return [loss, norm]


@_step("parameters changed before the backward pass")
def _changed(world: World, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    plain(world, optimizer, seed)
    loss = forward(world, seed + 1)
    optimizer.step()
    loss.backward()
    return [loss]


@_step("an input changed before the backward pass")
def _input_changed(world: World, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad()
    sample = world.change_sample(world.case.sample(seed, world.batch))
    with _autocast(world):
        loss = loss_of(world, world.call(**sample))
    with torch.no_grad():
        next(iter(sample.values())).mul_(0)
    loss.backward()
    optimizer.step()
    return [loss]


@_step("saved tensors on the CPU")
def _save_on_cpu(world: World, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    with torch.autograd.graph.save_on_cpu():
        return plain(world, optimizer, seed)


@_step("anomaly detection")
def _anomaly(world: World, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    with torch.autograd.detect_anomaly(check_nan=True):
        return plain(world, optimizer, seed)


@_step("backward in another thread")
def _thread(world: World, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad()
    loss = forward(world, seed)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            loss.backward()
        except Exception as error:  # noqa: BLE001  # raised again in the loop's own thread
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    optimizer.step()
    return [loss]


@_step("torch.func.grad")
def _functional(world: World, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    sample = world.change_sample(world.case.sample(seed, world.batch))
    parameters = {k: v.detach() for k, v in world.model.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return loss_of(world, torch.func.functional_call(world.model, parameters, (), sample))

    grads = torch.func.grad(loss)(parameters)
    return [g for _, g in sorted(grads.items())]


@_step("functional_call with other parameters")
def _other_parameters(world: World, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    sample = world.change_sample(world.case.sample(seed, world.batch))
    parameters = {k: (v.detach() * 0.5).requires_grad_() for k, v in world.model.named_parameters()}
    loss = loss_of(world, torch.func.functional_call(world.model, parameters, (), sample))
    loss.backward()
    return [loss, *(v.grad for v in parameters.values() if v.grad is not None)]


@_step("forward-mode derivative")
def _forward_mode(world: World, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    if world.case.loss is None:
        raise Unfit("tokens")
    import torch.autograd.forward_ad as fwd

    sample = world.change_sample(world.case.sample(seed, world.batch))
    with fwd.dual_level():
        sample["x"] = fwd.make_dual(sample["x"], torch.ones_like(sample["x"]))
        loss = loss_of(world, world.call(**sample))
        value, tangent = fwd.unpack_dual(loss)
        if tangent is None:
            return [value.detach().clone()]
        return [value.detach().clone(), tangent.detach().clone()]
