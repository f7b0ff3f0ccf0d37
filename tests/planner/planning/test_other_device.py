"""Plans for a device that the model does not lie on."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.testing.bitwise import assert_same_training
from benchmarks.testing.zoo import (
    ZOO,
    Case,
    cases,
)
from graph_capture.absent_cuda.dispatch_rules import ONE_KERNEL_ON_CUDA
from graph_capture.cost_graph import CostGraph, Operator
from graph_capture.costs.devices import DEVICES
from graph_capture.errors import CaptureError
from graph_capture.step_capture import capture
from planner import Plan, optimize
from planner.errors import InfeasibleBudgetError, PlanMismatchError
from planner.planning.make_plan import replan
from planner.running.recapture import on_card_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")

BATCH, LENGTH, WIDTH, HEADS, VOCAB = 2, 64, 128, 4, 256


def _gpt2(attention: str = "sdpa") -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=LENGTH,
        n_embd=WIDTH,
        n_layer=2,
        n_head=HEADS,
        attn_implementation=attention,
    )
    return GPT2LMHeadModel(config).train()


def _llama(attention: str = "sdpa") -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).train()


def _tokens() -> dict[str, Tensor]:
    tokens = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % VOCAB
    return {"input_ids": tokens, "labels": tokens}


def _plan(model: nn.Module, device: str = "h100", **options: Any) -> Plan:
    options = {"budget_gb": 40, "autocast": torch.bfloat16, "time_limit_s": 5, **options}
    return optimize(model, _tokens(), device=device, **options)


@functools.cache
def _planned(make: Callable[[], nn.Module], device: str = "h100") -> Plan:
    """A plan of a model on the CPU, for tests that only read it."""
    return _plan(make(), device)


def _targets(graph: CostGraph) -> Counter[str]:
    return Counter(target for op in graph.operators for target in op.target.split("+"))


def _attention(graph: CostGraph) -> set[str]:
    return {
        target.removeprefix("aten._scaled_dot_product_").removesuffix("_attention.default")
        for target in _targets(graph)
        if target.endswith("_attention.default")
    }


@pytest.mark.parametrize(
    ("make", "device", "kernel"),
    [
        (_gpt2, "a100", "flash"),
        (_gpt2, "h100", "flash"),  # cuDNN draws only with multiples of 1/16, dropout is 0.1
        (_llama, "a100", "flash"),
        (_llama, "h100", "cudnn"),
    ],
    ids=["gpt2-a100", "gpt2-h100", "llama-a100", "llama-h100"],
)
def test_language_models_under_autocast(make: Any, device: str, kernel: str) -> None:
    """Weights are cast, attention is a fused kernel, dropout one call that draws."""
    if torch.__version__ < "2.12" and device == "h100":
        kernel = "cudnn"  # took every dropout
    graph = _planned(make, device).graph
    assert _attention(graph) == {kernel}
    assert _targets(graph)["aten._to_copy.default"] >= 2 * (4 if make is _gpt2 else 7)
    assert not any("bernoulli" in target for target in _targets(graph))


def _blocks(num_bytes: int) -> int:
    return -(-num_bytes // 512) * 512


def _outputs(graph: CostGraph, op: Operator) -> list[int]:
    return [graph.storages[k].size_bytes for k in op.outputs]


def test_sizes_of_a_layer() -> None:
    """GPT-2's first layer: bfloat16 products, float32 residuals, a mask of a byte an element."""
    graph = _planned(_gpt2, "a100").graph
    rows = BATCH * LENGTH
    layer = [
        op
        for op in graph.operators
        if op.phase == "forward" and op.module_path.startswith("transformer.h.0")
    ]

    def only(path: str, target: str) -> Operator:
        (found,) = [op for op in layer if op.module_path.endswith(path) and target in op.target]
        return found

    assert _outputs(graph, only("attn.c_attn", "addmm")) == [_blocks(rows * 3 * WIDTH * 2)]
    assert _outputs(graph, only("mlp.c_fc", "addmm")) == [_blocks(rows * 4 * WIDTH * 2)]
    assert _outputs(graph, only("mlp.c_proj", "addmm")) == [_blocks(rows * WIDTH * 2)]
    normed = _outputs(graph, only("ln_1", "native_layer_norm"))
    assert normed == [_blocks(rows * WIDTH * 4), _blocks(rows * 4), _blocks(rows * 4)]
    attended = _outputs(graph, only("attn", "flash"))
    assert attended[:2] == [_blocks(rows * WIDTH * 2), _blocks(BATCH * HEADS * LENGTH * 4)]
    assert sum(attended[2:]) <= 3 * 512  # state of the generator
    dropped = _outputs(graph, only("attn.resid_dropout", "native_dropout"))
    assert dropped == [_blocks(rows * WIDTH * 2), _blocks(rows * WIDTH)]


def test_the_librarys_workspace_is_counted() -> None:
    """Where something is multiplied cuBLAS holds a workspace; else it does not."""
    model = nn.Linear(4, 4)
    multiplied = capture(model, torch.zeros(2, 4), device="h100")
    named = [s for s in multiplied.storages if s.name == "library workspace"]
    assert [s.size_bytes for s in named] == [DEVICES["h100"].library_workspace_bytes]
    assert named[0].producer is None
    elementwise = capture(nn.LayerNorm(4), torch.zeros(2, 4), device="h100")
    assert not [s for s in elementwise.storages if s.name == "library workspace"]
    assert not [s for s in capture(model, torch.zeros(2, 4)).storages if "library" in s.name]


def test_a_state_of_the_generator_takes_no_device_memory() -> None:
    """CUDA's 16 bytes lie in host memory."""
    graph = capture(nn.Dropout(0.1).train(), _leaf(4, 4), device="h100", loss_fn=torch.sum)
    states = [s for s in graph.storages if s.name.startswith("generator_state")]
    assert [s.size_bytes for s in states] == [0]


def _leaf(*shape: int) -> Tensor:
    return torch.zeros(*shape, requires_grad=True)


@pytest.mark.parametrize("make", [_gpt2, _llama], ids=["gpt2", "llama"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_plan_does_not_depend_on_where_the_model_lies(make: Any, attention: str) -> None:
    """On the CPU, on meta and in a file it is the same step."""
    plan = _plan(make(attention))
    with torch.device("meta"):
        on_meta = make(attention)
    assert _plan(on_meta).fingerprint == plan.fingerprint
    assert ("attention" in "".join(_targets(plan.graph))) == (attention == "sdpa")


def test_a_plan_for_a_card_goes_through_a_file(tmp_path: Path) -> None:
    """Graph, schedule, device and autocast come back."""
    plan = _planned(_llama)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.fingerprint == plan.fingerprint
    assert loaded.schedule == plan.schedule
    assert loaded.device_type == "cuda"
    assert loaded.guard.autocast == "bfloat16"
    assert {spec.device for spec in loaded.guard.state.values()} == {"cuda:0"}
    assert loaded.guard == plan.guard


def test_a_smaller_budget_recomputes() -> None:
    """The plan is solved for the card's own graph."""
    whole = _planned(_llama).baseline_peak_bytes
    fixed = DEVICES["h100"].library_workspace_bytes
    budget_bytes = fixed + int(0.85 * (whole - fixed))
    plan = _plan(_llama(), budget_gb=None, budget_bytes=budget_bytes, headroom=0)
    assert plan.predicted_peak_bytes <= budget_bytes
    assert plan.schedule.recomputed()


def test_another_shape_is_planned_for_the_same_card() -> None:
    """A second plan keeps device, autocast and budget."""
    model = _llama()
    plan = _plan(model)
    shorter = {name: tokens[:, : LENGTH // 2] for name, tokens in _tokens().items()}
    from graph_capture.calls.autocast import autocast_as

    with autocast_as("cuda", torch.bfloat16):
        other, _ = replan(plan, plan._live, model, shorter, model.forward)
    assert other.device_type == "cuda"
    assert _attention(other.graph) == _attention(plan.graph)
    assert other.baseline_peak_bytes < plan.baseline_peak_bytes


@pytest.mark.parametrize("through_file", [False, True])
def test_a_plan_for_a_card_does_not_fit_the_cpu(through_file: bool, tmp_path: Path) -> None:
    """The error says that the model has to be moved."""
    model = _gpt2()
    plan = _planned(_gpt2)
    if through_file:
        plan.save(tmp_path / "plan.json")
        plan = Plan.load(tmp_path / "plan.json")
    with pytest.raises(PlanMismatchError, match=r"lies on cpu: move the model .*cuda:0"):
        plan.apply(model)


# -- what CUDA would choose --------------------------------------------------------------


class _Attends(nn.Module):
    """Attention of given shapes, with what its caller asks for."""

    def __init__(self, dtype: torch.dtype, **options: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(
            q * self.scale, k * self.scale, v * self.scale, attn_mask=mask, **self.options
        )


def _chosen(
    dtype: torch.dtype,
    *,
    device: str = "a100",
    width: int = 64,
    heads: tuple[int, int] = (4, 4),
    lengths: tuple[int, int] = (16, 16),
    mask: Tensor | None = None,
    **options: Any,
) -> tuple[str, CostGraph]:
    q = torch.zeros(2, heads[0], lengths[0], width, dtype=dtype)
    k, v = (torch.zeros(2, heads[1], lengths[1], width, dtype=dtype) for _ in range(2))
    sample = (q, k, v) if mask is None else (q, k, v, mask)
    graph = capture(_Attends(dtype, **options), sample, device=device, loss_fn=torch.sum)
    names = _attention(graph)
    return (names.pop() if names else "math"), graph


_HALF, _BF16, _FULL, _DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("dtype", "options", "kernel"),
    [
        (_BF16, {}, "flash"),
        (_HALF, {"is_causal": True, "dropout_p": 0.1}, "flash"),
        (_BF16, {"width": 256}, "flash"),
        (_BF16, {"width": 264}, "efficient"),
        (_BF16, {"heads": (4, 2), "enable_gqa": True}, "flash"),
        (_BF16, {"lengths": (8, 16), "is_causal": True}, "efficient"),
        (_BF16, {"mask": torch.zeros(16, 16, dtype=_BF16)}, "efficient"),
        (_FULL, {}, "efficient"),
        (_FULL, {"width": 66}, "math"),
        (_FULL, {"heads": (4, 2), "enable_gqa": True}, "math"),
        (_DOUBLE, {}, "math"),
        (_BF16, {"device": "h100"}, "cudnn"),
        (_BF16, {"device": "h100", "mask": torch.ones(16, 16, dtype=torch.bool)}, "cudnn"),
        (_BF16, {"device": "h100", "width": 20}, "flash"),
        (_BF16, {"device": "b200", "width": 256}, "flash"),
        (_FULL, {"device": "h100"}, "efficient"),
        (_BF16, {"device": "l40s", "width": 224}, "efficient"),
        (_BF16, {"device": "rtx4090", "width": 192}, "flash"),
    ],
)
def test_the_kernel_of_attention(dtype: torch.dtype, options: dict[str, Any], kernel: str) -> None:
    """As sdp_utils.cpp decides by dtype, shapes, mask and card."""
    assert _chosen(dtype, **options)[0] == kernel


@pytest.mark.parametrize(
    ("backend", "kernel"),
    [
        (SDPBackend.FLASH_ATTENTION, "flash"),
        (SDPBackend.EFFICIENT_ATTENTION, "efficient"),
        (SDPBackend.CUDNN_ATTENTION, "cudnn"),
        (SDPBackend.MATH, "math"),
    ],
    ids=["flash", "efficient", "cudnn", "math"],
)
def test_the_users_kernel_is_taken(backend: SDPBackend, kernel: str) -> None:
    """``sdpa_kernel`` holds for the card that is not there as it would on it."""
    with sdpa_kernel(backend):
        assert _chosen(_BF16, device="h100")[0] == kernel


def test_no_kernel_is_left() -> None:
    """Flash attention alone does not take float32."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(CaptureError, match="no kernel"):
        _chosen(_FULL)


def test_narrow_heads_are_padded() -> None:
    """Flash attention reads heads whose width is a multiple of 8: 20 becomes 24."""
    _, graph = _chosen(_BF16, width=20)
    pads = [op for op in graph.operators if "constant_pad_nd" in op.target and op.phase != "loss"]
    assert len(pads) >= 3
    assert _outputs(graph, pads[0]) == [_blocks(2 * 4 * 16 * 24 * 2)]


def test_unaligned_masks_are_padded() -> None:
    """A bias of 18 columns gets 6 more, so that its rows begin at multiples of 8."""
    _, graph = _chosen(_BF16, lengths=(18, 18), mask=torch.zeros(18, 18, dtype=_BF16))
    (pad,) = [op for op in graph.operators if "constant_pad_nd" in op.target]
    assert _outputs(graph, pad) == [_blocks(18 * 24 * 2)]


class _Norms(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


@pytest.mark.parametrize(
    ("options", "dtype", "kernel"),
    [
        ({}, _FULL, "aten.cudnn_batch_norm.default"),
        ({"affine": False}, _FULL, "aten.native_batch_norm.default"),
        ({"track_running_stats": False}, _FULL, "aten.cudnn_batch_norm.default"),
        ({}, _BF16, "aten.native_batch_norm.default"),
    ],
)
def test_the_kernel_of_batch_norm(options: dict[str, Any], dtype: torch.dtype, kernel: str) -> None:
    """cuDNN's where there is a scale and the values are not bfloat16."""
    x = torch.zeros(4, 8, 6, 6, dtype=dtype, requires_grad=True)
    graph = capture(_Norms(**options), x, device="a100", loss_fn=lambda out: out.float().sum())
    assert kernel in _targets(graph)


def test_batch_norm_without_cudnn() -> None:
    """``torch.backends.cudnn.flags`` holds, too."""
    with torch.backends.cudnn.flags(enabled=False):
        graph = capture(_Norms(), torch.zeros(4, 8, 6, 6), device="a100", loss_fn=torch.sum)
    assert "aten.native_batch_norm.default" in _targets(graph)


def test_convolutions_keep_the_layout_of_channels() -> None:
    """cuDNN's output of a channels-last image is channels-last: no copy for what follows."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)).to(
        memory_format=torch.channels_last
    )
    x = torch.zeros(2, 3, 16, 16).to(memory_format=torch.channels_last)
    graph = capture(model, x, device="a100", loss_fn=torch.sum)
    assert not [op for op in graph.operators if op.phase == "forward" and "clone" in op.target]


def test_rms_norm_is_one_kernel() -> None:
    """CUDA has a kernel where autograd would take the function apart."""
    graph = capture(nn.RMSNorm(8), torch.zeros(4, 8), device="a100", loss_fn=torch.sum)
    assert "aten._fused_rms_norm.default" in _targets(graph)


def test_the_gradient_of_silu_is_one_kernel() -> None:
    """So it is with SiLU's gradient."""
    model = nn.Sequential(nn.Linear(4, 4), nn.SiLU())
    graph = capture(model, torch.zeros(2, 4), device="a100", loss_fn=torch.sum)
    assert "aten.silu_backward.default" in _targets(graph)


@pytest.mark.skipif(torch.version.cuda is None, reason="a build without CUDA's kernels")
def test_all_functions_with_a_kernel_on_cuda_are_known() -> None:
    """A CUDA build's dispatcher lists those that have a composite implementation, too."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("aten::")}
    both = {n for n in names if has(n, "CompositeImplicitAutograd") and has(n, "CUDA")}
    assert both == {f"aten::{name}" for name in ONE_KERNEL_ON_CUDA}


def test_nothing_of_it_stays() -> None:
    """Afterwards functions on the CPU dispatch as before."""
    before = capture(nn.RMSNorm(8), torch.zeros(4, 8), loss_fn=torch.sum)
    _chosen(_BF16, device="h100")
    after = capture(nn.RMSNorm(8), torch.zeros(4, 8), loss_fn=torch.sum)
    assert after.fingerprint == before.fingerprint


def test_recurrent_networks_are_refused() -> None:
    """They run in cuDNN, whose memory cannot be known without it."""
    with pytest.raises(CaptureError, match="module '', a GRU, runs in cuDNN"):
        capture(nn.GRU(4, 4), torch.zeros(3, 2, 4), device="h100")


class _Samples(nn.Module):
    def __init__(self, align_corners: bool) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.eye(2, 3)[None])
        self.align_corners = align_corners

    def forward(self, x: Tensor) -> Tensor:
        grid = F.affine_grid(self.theta, list(x.shape), align_corners=self.align_corners)
        return F.grid_sample(x, grid, align_corners=self.align_corners)


def test_sampling_on_a_grid() -> None:
    """PyTorch's own kernel is captured, cuDNN's is refused."""
    x = torch.zeros(1, 3, 8, 8)
    graph = capture(_Samples(False), x, device="a100", loss_fn=torch.sum)
    assert "aten.grid_sampler_2d.default" in _targets(graph)
    with pytest.raises(CaptureError, match="grid_sample with align_corners=True runs in cuDNN"):
        capture(_Samples(True), x, device="a100", loss_fn=torch.sum)


def test_targets_of_the_loss_come_along() -> None:
    """Labels that a loss_fn brings lie on the CPU now, and on the card then."""
    labels = torch.tensor([0, 1])
    graph = capture(
        nn.Linear(4, 4),
        torch.zeros(2, 4),
        device="h100",
        loss_fn=lambda out: F.cross_entropy(out, labels),
    )
    (held,) = [s for s in graph.storages if s.name == "held by loss_fn"]
    assert held.size_bytes == 16


# -- meta ------------------------------------------------------------------------------------


def _trained_by_a_plan_from_meta(case: Case) -> None:
    with torch.device("meta"):
        on_meta = case.build()

    def plan_within(budget_bytes: int) -> Plan:
        with case.context():
            return optimize(
                on_meta,
                case.sample(0),
                budget_bytes=budget_bytes,
                loss_fn=case.loss_fn,
                time_limit_s=1,
            )

    try:
        plan = plan_within(int(0.9 * plan_within(10**9).baseline_peak_bytes))
    except InfeasibleBudgetError as error:
        plan = plan_within(error.min_budget_bytes)

    def planned(model: nn.Module) -> nn.Module:
        with case.context():
            return plan.apply(model)

    assert_same_training(
        case.build, planned, case.sample, loss_fn=case.loss_fn, context=case.context
    )


ON_META = ("gpt2", "lstm", "mlp_bf16")


@pytest.mark.parametrize("case", cases("tiny", *ON_META))
def test_a_plan_from_meta_trains_the_real_model(case: Case) -> None:
    """What was planned without memory has the bits of eager with it."""
    _trained_by_a_plan_from_meta(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases("tiny", *(name for name in ZOO if name not in ON_META)))
def test_other_plans_from_meta_train_the_real_model(case: Case) -> None:
    """The same for the other models."""
    _trained_by_a_plan_from_meta(case)


def test_a_plan_serves_any_card_of_its_kind() -> None:
    """A model on another card than the first is taken for what was planned, by apply."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    plan = optimize(model, torch.ones(4, 8), budget_gb=1, loss_fn=torch.sum, device="h100")
    with FakeTensorMode():
        other = nn.Sequential(
            nn.Linear(8, 8, device="cuda:1"), nn.ReLU(), nn.Linear(8, 1, device="cuda:1")
        )
    moved, _ = on_card_of(plan, None, other)
    assert {spec.device for spec in moved.guard.state.values()} == {"cuda:1"}
    assert moved.guard.arguments["input"].device == "cuda:1"
    assert moved.fingerprint == plan.fingerprint
    assert on_card_of(plan, None, model) == (plan, None)  # on the CPU: refused when it is applied
