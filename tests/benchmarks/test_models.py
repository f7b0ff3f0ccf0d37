"""Models of the literature: their published sizes, their samples, that they are planned."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.literature.questions import captured_graph
from benchmarks.models import SUBJECTS
from benchmarks.models.fcn import FCN8
from benchmarks.models.mobilenet import MobileNetV1, MobileNetV2
from benchmarks.models.resnet import make_resnet
from benchmarks.models.segnet import SegNet
from benchmarks.models.unet import UNet
from benchmarks.models.vgg import VGG
from planner import optimize
from solvers.instances import keep_all_peak_bytes
from solvers.least_memory import least_memory
from solvers.strategies import find_blocks

pytest.importorskip("transformers")


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("make", "published"),
    [
        (lambda: VGG(16), 138_357_544),
        (lambda: VGG(19), 143_667_240),
        (MobileNetV1, 4_231_976),
        (MobileNetV2, 3_504_872),
        (lambda: make_resnet(depths=(3, 4, 6, 3), width=64, classes=1000), 25_557_032),
    ],
    ids=["vgg16", "vgg19", "mobilenet", "mobilenet_v2", "resnet50"],
)
def test_classifiers_have_their_published_size(make, published: int) -> None:
    """Parameters with 1,000 classes, to the last one."""
    with torch.device("meta"):
        assert num_parameters(make()) == published


def test_mobilenet_halves_with_its_multiplier() -> None:
    """The paper's table 7: 1.3 million parameters at a width of 0.5."""
    with torch.device("meta"):
        assert num_parameters(MobileNetV1(width=0.5)) == pytest.approx(1.3e6, rel=0.03)


def test_unet_without_padding_is_the_papers() -> None:
    """572 x 572 pixels of one channel give 388 x 388, through 1,024 channels at 28 x 28."""
    with torch.device("meta"):
        model = UNet(channels=1, padded=False)
        deepest = []
        model.down[-1].register_forward_hook(lambda *call: deepest.append(call[-1].shape))
        assert model(torch.empty(1, 1, 572, 572)).shape == (1, 2, 388, 388)
    assert deepest == [(1, 1024, 28, 28)]


@pytest.mark.parametrize("make", [UNet, FCN8, SegNet], ids=["unet", "fcn8", "segnet"])
def test_segmenters_give_a_score_for_each_pixel(make) -> None:
    """On Checkmate's images of 416 x 608 pixels the output has their size."""
    with torch.device("meta"):
        assert make(classes=7)(torch.empty(1, 3, 416, 608)).shape == (1, 7, 416, 608)


def test_segnet_unpools_where_pooling_found_the_largest() -> None:
    """Zeros stay between the values that come back up, each at its own place."""
    model = SegNet(classes=2, width=2)
    model.down = nn.ModuleList([nn.Identity()])
    model.up = nn.ModuleList([nn.Identity()])
    model.head = nn.Identity()
    x = torch.tensor([[[[1.0, 2.0], [4.0, 3.0]]]])
    assert model(x).tolist() == [[[[0.0, 0.0], [4.0, 0.0]]]]


@pytest.mark.parametrize("name", SUBJECTS)
def test_paper_sizes_take_no_memory(name: str) -> None:
    """Built on meta, sample and all, with the batch that is asked for."""
    subject = SUBJECTS[name]("paper")
    if name == "llama":
        subject = SUBJECTS[name]("record")  # seconds for 7 billion parameters, even on meta
    sample = subject.sample(device="meta", batch=3)
    assert all(t.is_meta for t in (*subject.build("meta").parameters(), *sample.values()))
    assert {len(t) for t in sample.values()} == {3}
    assert subject.batch == len(next(iter(subject.sample(device="meta").values())))


def test_seeds_decide_weights_and_samples() -> None:
    """The same seed gives the same bits, another one others; the global generator stays."""
    subject = SUBJECTS["bert"]("tiny")
    before = torch.random.get_rng_state()
    one, again, other = (subject.build(seed=s) for s in (1, 1, 2))
    first, second, third = (subject.sample(s)["input_ids"] for s in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    weights = [next(model.parameters()) for model in (one, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBJECTS)
def test_tiny_models_are_captured_and_planned(name: str) -> None:
    """Each has several blocks, and a plan within half of the way down to the least peak."""
    subject = SUBJECTS[name]("tiny")
    model, sample = subject.build("meta"), subject.sample(device="meta", batch=8)
    graph = captured_graph(model, sample, measure_scratch=True)
    assert len(find_blocks(graph)) > 1
    most, least = keep_all_peak_bytes(graph), least_memory(graph, time_limit_s=1).peak_bytes
    budget = (most + least) // 2
    plan = optimize(model, sample, budget_bytes=budget, loss_fn=subject.loss_fn, time_limit_s=1)
    assert plan.predicted_peak_bytes <= budget
    assert (plan.overhead > 0) == (least < most)
    # Which workspace a convolution takes is the processor's choice: in these, on some processors,
    # that of the first layers' backward pass is the peak, and nothing that runs again lowers it.
    assert least < most or name in ("vgg16", "vgg19", "fcn8", "vit")


def test_planned_steps_have_the_same_bits() -> None:
    """SegNet: pooling's indices and batch norm's statistics; loss and gradients are eager's."""
    subject = SUBJECTS["segnet"]("tiny")
    eager, model = subject.build(), subject.build()
    sample = subject.sample(3, batch=4)
    graph = captured_graph(model, sample, measure_scratch=True)
    budget = int(0.85 * keep_all_peak_bytes(graph))
    plan = optimize(model, sample, budget_bytes=budget, time_limit_s=1)
    assert plan.overhead > 0
    plan.apply(model)
    losses = [m(**sample) for m in (eager, model)]
    for loss in losses:
        loss.backward()
    assert torch.equal(losses[0], losses[1])
    for expected, parameter in zip(eager.parameters(), model.parameters(), strict=True):
        assert expected.grad is not None
        assert torch.equal(expected.grad, parameter.grad)
