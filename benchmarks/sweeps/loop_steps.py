"""The forms of one step of a training loop."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .loop_models import TwoHeads
from .loop_side import LoopSide, Unfit

Step = Callable[[LoopSide, torch.optim.Optimizer, int], list[Any]]
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
def _autocast(side: LoopSide) -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16, enabled=side.autocast):
        yield


def forward(side: LoopSide, seed: int, batch: int | None = None) -> Tensor:
    """One forward and its loss."""
    sample = side.change_sample(side.case.sample(seed, batch or side.batch))
    with _autocast(side):
        return loss_of(side, side.call(**sample))


def loss_of(side: LoopSide, output: Any) -> Tensor:
    if side.loss is not None:
        return side.loss(output)
    return output.loss


@_step("plain")
def plain(side: LoopSide, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad()
    loss = forward(side, seed)
    loss.backward()
    optimizer.step()
    return [loss]


@_step("gradients set to zero, not to None")
def _zeroed(side: LoopSide, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad(set_to_none=False)
    loss = forward(side, seed)
    loss.backward()
    optimizer.step()
    return [loss]


@_step("zero_grad after forward")
def _zero_after(side: LoopSide, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    loss = forward(side, seed)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return [loss]


@_step("accumulated over two")
def _accumulated(side: LoopSide, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad()
    losses = []
    for i in range(2):
        loss = forward(side, seed + 500 * i)
        (loss / 2).backward()
        losses.append(loss)
    optimizer.step()
    return losses


@_step("two forwards, one backward")
def _two_forwards(side: LoopSide, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad()
    first, second = forward(side, seed), forward(side, seed + 500)
    (first + second).backward()
    optimizer.step()
    return [first, second]


@_step("two forwards, backwards crossed")
def _crossed(side: LoopSide, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad()
    first, second = forward(side, seed), forward(side, seed + 500)
    first.backward()
    second.backward()
    optimizer.step()
    return [first, second]


@_step("two backwards of one forward")
def _two_backwards(side: LoopSide, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad()
    loss = forward(side, seed)
    loss.backward(retain_graph=True)
    (2 * loss).backward()
    optimizer.step()
    return [loss]


@_step("a second backward without retain_graph")
def _freed(side: LoopSide, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad()
    loss = forward(side, seed)
    loss.backward()
    loss.backward()
    return [loss]


@_step("a backward for each of two losses")
def _separate(side: LoopSide, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad()
    sample = side.change_sample(side.case.sample(seed, side.batch))
    with _autocast(side):
        output = side.call(**sample)
        if isinstance(side.model, TwoHeads):
            losses = [output.main.pow(2).mean(), output.side.pow(2).mean()]
        else:
            loss = loss_of(side, output)
            losses = [loss * 0.5, loss * 0.25]
    losses[0].backward(retain_graph=True)
    losses[1].backward()
    optimizer.step()
    return losses


@_step("gradients by autograd.grad")
def _grad(side: LoopSide, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad()
    loss = forward(side, seed)
    parameters = [p for p in side.model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    for p, g in zip(parameters, grads, strict=True):
        p.grad = g
    optimizer.step()
    return [loss]


@_step("gradients of some parameters only")
def _some(side: LoopSide, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad()
    loss = forward(side, seed)
    loss.backward(inputs=[p for p in side.model.parameters() if p.requires_grad][:2])
    optimizer.step()
    return [loss]


@_step("a gradient penalty")
def _penalty(side: LoopSide, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad()
    loss = forward(side, seed)
    parameters = [p for p in side.model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    penalty = torch.stack([g.pow(2).sum() for g in grads if g is not None]).sum()
    (loss + 0.1 * penalty).backward()
    optimizer.step()
    return [loss, penalty]


@_step("a gradient penalty by the input")
def _input_penalty(side: LoopSide, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    if side.case.loss is None:
        raise Unfit("tokens")
    optimizer.zero_grad()
    sample = side.change_sample(side.case.sample(seed, side.batch))
    sample["x"] = sample["x"].detach().requires_grad_()
    with _autocast(side):
        loss = loss_of(side, side.call(**sample))
    (g,) = torch.autograd.grad(loss, sample["x"], create_graph=True)
    (loss + g.pow(2).sum()).backward()
    optimizer.step()
    return [loss, g]


@_step("no_grad")
def _no_grad(side: LoopSide, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    with torch.no_grad():
        return [forward(side, seed)]


@_step("inference_mode")
def _inference(side: LoopSide, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    with torch.inference_mode():
        return [forward(side, seed).clone()]


@_step("evaluated in between")
def _evaluated(side: LoopSide, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    side.model.eval()
    with torch.no_grad():
        score = forward(side, seed, batch=3)
    side.model.train()
    return [score, *plain(side, optimizer, seed)]


@_step("trained in eval mode")
def _eval_training(side: LoopSide, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    side.model.eval()
    try:
        return plain(side, optimizer, seed)
    finally:
        side.model.train()


@_step("no backward")
def _no_backward(side: LoopSide, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    return [forward(side, seed)]


@_step("an exception in the loss")
def _exception_loss(side: LoopSide, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad()
    with contextlib.suppress(Interrupted):
        forward(side, seed)
        raise Interrupted
    return plain(side, optimizer, seed)


def _with_hook(side: LoopSide, seed: int, error: type[BaseException]) -> None:
    def stop(g: Tensor) -> None:
        raise error("stopped in the backward pass")

    parameter = next(p for p in side.model.parameters() if p.requires_grad)
    handle = parameter.register_hook(stop)
    try:
        forward(side, seed).backward()
    finally:
        handle.remove()


@_step("an exception in the backward pass")
def _exception_backward(side: LoopSide, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad()
    with contextlib.suppress(Interrupted):
        _with_hook(side, seed, Interrupted)
    optimizer.zero_grad()  # which gradients exist at this point is not promised
    return [torch.get_rng_state()]


@_step("Ctrl-C in the backward pass")
def _ctrl_c(side: LoopSide, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad()
    with contextlib.suppress(KeyboardInterrupt):
        _with_hook(side, seed, KeyboardInterrupt)
    optimizer.zero_grad()
    return [torch.get_rng_state()]


@_step("a wrong argument")
def _wrong(side: LoopSide, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    with contextlib.suppress(TypeError):
        side.call(nothing_of_this_name=1)
    return plain(side, optimizer, seed)


@_step("a closure, twice")
def _closure(side: LoopSide, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = forward(side, seed)
        loss.backward()
        return loss

    closure()
    loss = optimizer.step(closure)
    return [loss]


@_step("gradients clipped")
def _clipped(side: LoopSide, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad()
    loss = forward(side, seed)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(side.model.parameters(), 0.01)
    optimizer.step()
    return [loss, norm]


@_step("parameters changed before the backward pass")
def _changed(side: LoopSide, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    plain(side, optimizer, seed)
    loss = forward(side, seed + 1)
    optimizer.step()
    loss.backward()
    return [loss]


@_step("an input changed before the backward pass")
def _input_changed(side: LoopSide, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad()
    sample = side.change_sample(side.case.sample(seed, side.batch))
    with _autocast(side):
        loss = loss_of(side, side.call(**sample))
    with torch.no_grad():
        next(iter(sample.values())).mul_(0)
    loss.backward()
    optimizer.step()
    return [loss]


@_step("saved tensors on the CPU")
def _save_on_cpu(side: LoopSide, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    with torch.autograd.graph.save_on_cpu():
        return plain(side, optimizer, seed)


@_step("anomaly detection")
def _anomaly(side: LoopSide, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    with torch.autograd.detect_anomaly(check_nan=True):
        return plain(side, optimizer, seed)


@_step("backward in another thread")
def _thread(side: LoopSide, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    optimizer.zero_grad()
    loss = forward(side, seed)
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
def _functional(side: LoopSide, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    sample = side.change_sample(side.case.sample(seed, side.batch))
    parameters = {k: v.detach() for k, v in side.model.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return loss_of(side, torch.func.functional_call(side.model, parameters, (), sample))

    grads = torch.func.grad(loss)(parameters)
    return [g for _, g in sorted(grads.items())]


@_step("functional_call with other parameters")
def _other_parameters(side: LoopSide, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    sample = side.change_sample(side.case.sample(seed, side.batch))
    parameters = {k: (v.detach() * 0.5).requires_grad_() for k, v in side.model.named_parameters()}
    loss = loss_of(side, torch.func.functional_call(side.model, parameters, (), sample))
    loss.backward()
    return [loss, *(v.grad for v in parameters.values() if v.grad is not None)]


@_step("forward-mode derivative")
def _forward_mode(side: LoopSide, optimizer: torch.optim.Optimizer, seed: int) -> list[Any]:
    if side.case.loss is None:
        raise Unfit("tokens")
    import torch.autograd.forward_ad as fwd

    sample = side.change_sample(side.case.sample(seed, side.batch))
    with fwd.dual_level():
        sample["x"] = fwd.make_dual(sample["x"], torch.ones_like(sample["x"]))
        loss = loss_of(side, side.call(**sample))
        value, tangent = fwd.unpack_dual(loss)
        if tangent is None:
            return [value.detach().clone()]
        return [value.detach().clone(), tangent.detach().clone()]
