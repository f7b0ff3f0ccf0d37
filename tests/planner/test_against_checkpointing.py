"""The line to beat: per-block checkpointing as Transformers does it.

``pytest tests/planner/test_against_checkpointing.py -m slow -s`` prints the
figures of ``docs/results.md``. Times are printed and never fail a test.
"""

import contextlib
import copy

import pytest
import torch
from torch import nn

from graph_capture.recording.recorder import Recorder
from graph_capture.tracing import trace
from planner import InfeasibleBudgetError, Plan, measure, optimize
from planner.base.training_step import make_step
from planner.measuring.measure import measure_pair

pytestmark = pytest.mark.slow


@pytest.fixture
def figures(request) -> bool:
    """Whether figures are printed (``-s``), for which steps are timed and more is planned."""
    return request.config.getoption("capture") == "no"


Sample = dict[str, torch.Tensor]


def language_model(name: str, num_layers: int, width: int, length: int) -> tuple[nn.Module, Sample]:
    """BERT or GPT-2 with dropout 0.1, batch 4, vocabulary 4096, without a key-value cache."""
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    heads = max(4, width // 64)
    if name == "bert":
        config = BertConfig(
            num_hidden_layers=num_layers,
            hidden_size=width,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            vocab_size=4096,
        )
        model: nn.Module = BertForMaskedLM(config)
    else:
        config = GPT2Config(
            n_layer=num_layers,
            n_embd=width,
            n_head=heads,
            vocab_size=4096,
            n_positions=length,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
            loss_type="ForCausalLMLoss",
        )
        model = GPT2LMHeadModel(config)
    device = next(model.parameters()).device
    tokens = torch.randint(0, 4096, (4, length), device=device)
    return model.train(), {"input_ids": tokens, "labels": tokens.clone()}


def checkpointed_step(model: nn.Module, sample: Sample) -> Plan:
    """The step with checkpoints as the model has them, predicted by the planner's own judge."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "checkpoints_inlined", contextlib.nullcontext)
        # A checkpoint puts the generator back in backward, which a plan could not follow.
        patch.setattr(Recorder, "check_generators", lambda self: None)
        return optimize(model, sample, budget_gb=1000)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_half_the_overhead_at_its_peak_and_a_lower_peak_at_its_time(name, figures):
    """At the measured peak of per-block checkpointing the plan recomputes about half as much,
    at its time it peaks lower, and the least feasible peak is below its peak."""
    model, sample = language_model(name, 6, 256, 256)
    checkpointed = copy.deepcopy(model)
    enable = getattr(checkpointed, "activation_checkpointing_enable", None)
    (enable or checkpointed.gradient_checkpointing_enable)()
    theirs = checkpointed_step(checkpointed, sample)
    plain = optimize(model, sample, budget_gb=1000)
    their_overhead = theirs.baseline_step_us / plain.baseline_step_us - 1
    their_peak = measure(checkpointed, sample, repeats=0).peak_bytes
    eager_peak = measure(model, sample, repeats=0).peak_bytes
    assert abs(theirs.baseline_peak_bytes / their_peak - 1) < 0.05

    plan = optimize(model, sample, budget_bytes=their_peak, time_limit_s=20)
    planned = plan.apply(copy.deepcopy(model))
    measured = measure(planned, sample, repeats=0)
    assert measured.peak_bytes <= their_peak
    assert plan.overhead <= 0.53 * their_overhead  # 0.52 (BERT), 0.48 (GPT-2): proven optima

    with pytest.raises(InfeasibleBudgetError) as error:
        optimize(model, sample, budget_bytes=10**6)
    least = error.value.min_budget_bytes
    assert least <= their_peak
    lower = optimize(model, sample, budget_bytes=least + (their_peak - least) // 3, time_limit_s=20)
    assert lower.overhead <= their_overhead

    def paired(first: nn.Module, second: nn.Module) -> str:
        steps = (make_step(m, sample, seed=0) for m in (first, second))
        return str(measure_pair(*steps, repeats=6))

    if figures:
        print(
            f"\n{name}, 6 layers, width 256, batch 4 x 256, vocabulary 4096, "
            f"{torch.get_num_threads()} threads, torch {torch.__version__}\n"
            f"  eager         peak {eager_peak}\n"
            f"  checkpointing peak {their_peak} ({their_peak / eager_peak:.3f}), predicted "
            f"overhead {their_overhead:.3f}, time/eager {paired(model, checkpointed)}\n"
            f"  plan          peak {measured.peak_bytes}, predicted {plan.predicted_peak_bytes}, "
            f"overhead {plan.overhead:.3f} ({plan.overhead / their_overhead:.2f} of theirs), gap "
            f"{plan.gap:.4f}, time/eager {paired(model, planned)}\n"
            f"                time/checkpointing {paired(checkpointed, planned)}\n"
            f"  least         peak {least} ({least / their_peak:.3f} of theirs), proven >= "
            f"{error.value.lower_bound_bytes}\n"
            f"  at its time   peak {lower.predicted_peak_bytes} "
            f"({lower.predicted_peak_bytes / their_peak:.3f} of theirs), overhead "
            f"{lower.overhead:.3f}, gap {lower.gap:.4f}"
        )


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_twelve_layers_are_planned_with_a_small_gap(name, figures):
    """Twelve layers of width 768, batch 4 x 512: the gap is at most 1 % at 80 and 50 %."""
    with torch.device("meta"):
        model, sample = language_model(name, 12, 768, 512)
    peak = optimize(model, sample, budget_gb=1000, optimizer="adamw").baseline_peak_bytes
    for fraction in (0.8, 0.5) if figures else (0.5,):
        plan = optimize(
            model,
            sample,
            budget_bytes=int(fraction * peak),
            optimizer="adamw",
            time_limit_s=40,
            gap=0.001 if figures else 0.01,
        )
        assert plan.gap <= 0.01
        if figures:
            print(f"\n{name}, 12 layers, {fraction}: {plan!r}, solved in {plan.solve_s:.1f} s")


def test_no_plan_costs_no_time(figures):
    """A budget above the baseline recomputes nothing; the time beside eager's is printed."""
    model, sample = language_model("bert", 6, 256, 128)
    plan = optimize(model, sample, budget_gb=100)
    planned = plan.apply(copy.deepcopy(model))
    assert not plan.schedule.recomputed()
    if figures:
        steps = (make_step(m, sample, seed=0) for m in (model, planned))
        print(f"\nbert without recomputation, time/eager {measure_pair(*steps, repeats=20)}")
