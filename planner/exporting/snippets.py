"""What to write into one's own code or command line, by tool."""

from __future__ import annotations

from collections.abc import Sequence

from .choice import Setting


def for_transformers(setting: Setting, names: Sequence[str]) -> str:
    """Switch on Transformers' own checkpointing, and off again in the other layers."""
    if not setting.layers:
        return "# nothing to checkpoint: leave Transformers' checkpointing off"
    lines = [
        "model.config.use_cache = False  # a layer that runs twice would fill it twice",
        'old = "gradient_checkpointing_enable"  # its name in earlier versions',
        'enable = getattr(model, "activation_checkpointing_enable", None) or getattr(model, old)',
        'enable({"use_reentrant": False})',
    ]
    off = [name for name in names if name not in setting.layers]
    if off:
        lines += [
            f"for name in {_listed(off)}:",
            "    layer = model.get_submodule(name)",
            '    assert hasattr(layer, "gradient_checkpointing"), f"{name} is no such layer"',
            "    layer.gradient_checkpointing = False",
        ]
    return "\n".join(lines)


def for_lightning(setting: Setting, names: Sequence[str]) -> str:
    """Wrap the layers in a ``LightningModule``'s own hook, whatever the strategy."""
    if not setting.layers:
        return "# nothing to checkpoint"
    return "\n".join(
        [
            "from functools import partial",
            "from torch.utils.checkpoint import checkpoint",
            "",
            "def configure_model(self):  # of the LightningModule; self.model is what was planned",
            f"    for name in {_listed(setting.layers, indent=4)}:",
            "        layer = self.model.get_submodule(name)",
            '        if not hasattr(layer, "own_forward"):  # the hook is called more than once',
            "            layer.own_forward = layer.forward",
            "            layer.forward = partial(",
            "                checkpoint, layer.own_forward, use_reentrant=False",
            "            )",
        ]
    )


def for_megatron(setting: Setting, names: Sequence[str]) -> str:
    """Flags of Megatron-LM's training scripts."""
    if setting.attention_cores:
        return "--recompute-granularity selective --recompute-modules core_attn"
    if not setting.layers:
        return "# no --recompute flags"
    everything = len(setting.layers) == len(names)
    method = "uniform" if everything else "block"
    num = setting.group_size if everything else len(setting.layers)
    return f"--recompute-granularity full --recompute-method {method} --recompute-num-layers {num}"


def for_deepspeed(setting: Setting, names: Sequence[str]) -> str:
    """The argument of DeepSpeed's ``PipelineModule``."""
    interval = setting.group_size if setting.layers else 0
    return f"PipelineModule(layers=layers, activation_checkpoint_interval={interval})"


def for_selective(setting: Setting, names: Sequence[str]) -> str:
    """A policy for ``create_selective_checkpoint_contexts``, and the layers wrapped with it."""
    if not setting.layers:
        return "# nothing to checkpoint"
    return "\n".join(
        [
            "from functools import partial",
            "from torch.utils.checkpoint import (",
            "    CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts",
            ")",
            "",
            f"SAVED = {_listed(setting.saved_calls)}",
            "",
            "def policy(context, call, *args, **kwargs):",
            "    if str(call) in SAVED:",
            "        return CheckpointPolicy.MUST_SAVE",
            "    return CheckpointPolicy.PREFER_RECOMPUTE",
            "",
            "contexts = partial(create_selective_checkpoint_contexts, policy)",
            f"for name in {_listed(setting.layers)}:",
            "    layer = model.get_submodule(name)",
            "    layer.forward = partial(",
            "        checkpoint, layer.forward, use_reentrant=False, context_fn=contexts",
            "    )",
        ]
    )


def _listed(texts: Sequence[str], indent: int = 0) -> str:
    """Write a list of strings, wrapped."""
    lines, line = [], ""
    for text in texts:
        item = f"{text!r}, "
        if line and len(line) + len(item) > 84 - indent:
            lines.append(line.rstrip())
            line = ""
        line += item
    lines.append(line.rstrip(", "))
    if len(lines) == 1:
        return f"[{lines[0]}]"
    space = " " * (indent + 4)
    return "[\n" + "\n".join(f"{space}{line}" for line in lines) + f"\n{' ' * indent}]"
