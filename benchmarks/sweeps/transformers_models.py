"""One tiny model of each family of Transformers, with inputs that fit its signature.

The head, inputs and labels of a family are found by trial: the heads in the order of
:data:`HEADS`, the inputs in the order of :func:`_recipes`, until one trains in eager.
Nothing is planned yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from planner.base.training_step import train_step

from .subject import Subject, mean_square
from .tiny_configs import tiny_config
from .transformers_inputs import recipes

HEADS = (
    "IMAGE_TEXT_TO_TEXT",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "CTC",
    "CAUSAL_LM",
    "MASKED_LM",
    "MULTIMODAL_LM",
    "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "SEMANTIC_SEGMENTATION",
    "OBJECT_DETECTION",
    "UNIVERSAL_SEGMENTATION",
    "DEPTH_ESTIMATION",
    "MASKED_IMAGE_MODELING",
    "TIME_SERIES_PREDICTION",
    "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLASSIFICATION",
    "QUESTION_ANSWERING",
    "PRETRAINING",
    "VISUAL_QUESTION_ANSWERING",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "RNNT",
    "TDT",
)


class DoesNotTrain(Exception):
    """No combination of head and inputs trains in eager."""


def families() -> list[str]:
    """Every model type with a model, by name."""
    from transformers.models.auto import modeling_auto

    return sorted(modeling_auto.MODEL_MAPPING_NAMES)


def subject(family: str) -> Subject:
    """The first head and inputs of a family that train.

    Raises
    ------
    DoesNotTrain
        Has the error of the last one tried.
    """
    failures: list[str] = []
    found = _first_that_trains(family, {}, failures)
    if found is None and any("get_seq_length" in failure for failure in failures):
        # Every fourth layer of a hybrid has attention, and its cache needs at least one.
        found = _first_that_trains(family, {"num_hidden_layers": 4}, failures)
    if found is None:
        raise DoesNotTrain(" | ".join(failures[-1:]) or "no model class")
    return found


def _first_that_trains(
    family: str, overrides: dict[str, Any], failures: list[str]
) -> Subject | None:
    for head, class_name in _heads(family):
        try:
            make = _maker(family, class_name, overrides)
            torch.manual_seed(0)
            model = make()
        except Exception as error:  # noqa: BLE001  # the next head is tried
            failures.append(f"{class_name}: {_first_line(error)}")
            continue
        for recipe in recipes(head, model):
            for with_labels in (True, False):
                found = _fitting(make, model, recipe, with_labels, failures)
                if found is not None:
                    return found
    return None


def _fitting(
    make: Callable[[], nn.Module],
    model: nn.Module,
    recipe: Callable[[int], dict[str, Any]],
    with_labels: bool,
    failures: list[str],
) -> Subject | None:
    def sample(seed: int) -> dict[str, Any]:
        inputs = recipe(seed)
        return inputs if with_labels else {k: v for k, v in inputs.items() if k not in _LABELS}

    try:
        has_labels = any(name in recipe(0) for name in _LABELS)
        if with_labels and not has_labels:
            return None
        loss_fn = None if with_labels else mean_square
        torch.manual_seed(1)
        _, loss = train_step(model, sample(1), loss_fn)
        if loss is None or not torch.isfinite(loss).all():
            failures.append(f"{type(model).__name__}: loss {loss}")
            return None
    except Exception as error:  # noqa: BLE001  # the next inputs are tried
        failures.append(f"{type(model).__name__}: {_first_line(error)}")
        return None
    finally:
        model.zero_grad(set_to_none=True)
    return Subject(make=make, sample=sample, loss_fn=loss_fn)


_LABELS = (
    "labels",
    "next_sentence_label",
    "start_positions",
    "end_positions",
    "mask_labels",
    "class_labels",
    "bool_masked_pos_labels",
)


def _heads(family: str) -> Iterator[tuple[str, str]]:
    from transformers.models.auto import modeling_auto

    for head in HEADS:
        names = getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES")
        if family in names:
            yield head, _single(names[family])
    yield "MODEL", _single(modeling_auto.MODEL_MAPPING_NAMES[family])


def _single(name: Any) -> str:
    return name if isinstance(name, str) else name[0]


def _maker(family: str, class_name: str, overrides: dict[str, Any]) -> Callable[[], nn.Module]:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_class = getattr(transformers, class_name, None)
    if model_class is None:
        import importlib

        module = importlib.import_module(
            CONFIG_MAPPING[family].__module__.replace("configuration_", "modeling_")
        )
        model_class = getattr(module, class_name)

    def make() -> nn.Module:
        return model_class(tiny_config(CONFIG_MAPPING[family], **overrides)).train()

    return make


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"
