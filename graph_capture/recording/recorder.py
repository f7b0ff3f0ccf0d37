"""Write down every call that eager PyTorch dispatches, as one torch.fx graph.

The recorder sits below autograd and above fake tensors. It sees the kernels that an
eager step would launch, forward and backward, in order, including in-place calls.
Nothing is decomposed or functionalized, so the graph computes what eager computes, to
the bit.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Graph, Node

from ..calls.call_places import CallPlaces, calling_line
from ..calls.collectives import ENDED, is_wait, refuse_in_place
from ..calls.layouts import refuse_nesting, refuse_result
from ..calls.spread_out import are_spread
from ..calls.storage_id import storage_id
from ..calls.writes import written_arguments
from ..errors import CaptureError
from ..private_torch.aten import assert_async
from ..private_torch.autograd import current_node
from ..private_torch.dispatch import disable_current_modes
from ..private_torch.fake_tensors import FakeTensor, FakeTensorMode
from ..private_torch.operators import OpOverload, schema_of
from ..private_torch.trees import tree_flatten, tree_iter, tree_map
from ..reads.asked_elsewhere import not_watched
from ..values.asked_numbers import AskedNumber
from ..values.constant_values import ConstantValues, ReplayAnswersMode
from ..values.outcomes import ASKS, GivenOutcomes, Outcome, ReadsWhole
from ..values.questions import Questions
from .fake_call_cache import FakeCallCache
from .kernels_word import kernels_word, laid_out_rightly
from .packed_sequences import PACK, packed
from .watched_generators import WatchedGenerators, refuse_other_generators

if TYPE_CHECKING:
    from .real_results import RealResults

_RESIZES = {"aten::resize_", "aten::resize_as_"}
_EXCHANGES = {getattr(torch.ops.aten.set_, name) for name in torch.ops.aten.set_.overloads()}
# Their effect is to raise, which they cannot do on stand-ins.
_ASSERTIONS = {assert_async.default, assert_async.msg}


def functional_twin(func: OpOverload) -> OpOverload:
    """``aten.squeeze_.dim`` -> ``aten.squeeze.dim``, ``aten.transpose_`` -> ``aten.transpose.int``.

    Overload names differ between the two, so the arguments decide.
    """
    packet = getattr(getattr(torch.ops, func.namespace), schema_of(func).name.split("::")[1][:-1])
    wanted = [(a.name, str(a.type)) for a in schema_of(func).arguments]
    for name in packet.overloads():
        twin = getattr(packet, name)
        if [(a.name, str(a.type)) for a in schema_of(twin).arguments] == wanted:
            return twin
    raise CaptureError(f"{func} has no counterpart that returns a view")


@dataclass(frozen=True, slots=True)
class _Expected:
    """An input that may be read: arguments of :meth:`Recorder.placeholder`, and its memory."""

    name: str
    tensor: torch.Tensor
    real: torch.Tensor
    meta: dict[str, Any]
    memory: int


class Recorder(ReadsWhole):
    """Appends a node to ``graph`` for every call that is dispatched.

    ``node.meta`` carries ``val`` (fake outputs), ``phase``, ``module_path``,
    ``source``, and for calls that write: ``writes``, the nodes written to.

    Parameters
    ----------
    current_node
        Returns the autograd node that is being differentiated.
    repeated
        Runs the calls; ``None`` leaves each to PyTorch.
    on_call
        Is called for each call that is dispatched.
    outcomes
        The answers to calls that ask for values; ``None`` to answer with the sample's
        values.
    twin
        Makes a stand-in for a tensor that the code brings along.
    real
        Knows the layout of real kernels' results, for others that run calls of the step.
    """

    def __init__(
        self,
        current_node: Callable[[], Any] = current_node,
        repeated: FakeCallCache | None = None,
        on_call: Callable[[], None] = lambda: None,
        outcomes: Sequence[Outcome] | None = None,
        twin: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
        real: RealResults | None = None,
    ) -> None:
        super().__init__()
        self.real = real
        self._repeated = repeated
        self._on_call = on_call
        self._twin = twin
        self._twin_of: dict[int, torch.Tensor] = {}  # id of a constant -> its stand-in
        self._expected: dict[int, _Expected] = {}
        self.graph = Graph()
        self.phase = "forward"
        self.constants: dict[str, torch.Tensor] = {}
        self.failed_at = ""
        self.generators = WatchedGenerators()
        self._node_of: dict[int, Node] = {}
        self._memory_of: dict[int, int] = {}  # id of a tensor -> storage that it had when bound
        self._keep_alive: list[Any] = []
        self._by_storage: dict[int, list[Node]] = {}
        self._known = ConstantValues()
        self.questions = Questions(self, None if outcomes is None else GivenOutcomes(outcomes))
        self._places = CallPlaces(current_node)

    # -- what enters from outside ------------------------------------------

    def placeholder(
        self, name: str, tensor: torch.Tensor, real: torch.Tensor | None = None, **meta: Any
    ) -> Node:
        """Declare an input of the step, with its real value on the sample if that is known."""
        node = self.graph.placeholder(name)
        node.meta.update(meta)
        self.bind(node, tensor)
        node.meta["val"] = tensor.detach()  # keeps its memory when ``tensor.data`` is set
        if real is not None:
            self.questions.values.give(node, real)
        return node

    def expect(self, name: str, tensor: torch.Tensor, real: torch.Tensor, **meta: Any) -> None:
        """Declare an input of the step if anything reads it."""
        self._expected[id(tensor)] = _Expected(name, tensor, real, meta, storage_id(tensor))

    def node_of(self, tensor: torch.Tensor) -> Node:
        """The node whose value ``tensor`` is.

        Raises
        ------
        CaptureError
            When nobody saw where the tensor came from.
        """
        self._refuse_undense(tensor)
        node = self._node_of.get(id(tensor))
        if node is not None and self._memory_of[id(tensor)] == storage_id(tensor):
            return node
        if node is None and not isinstance(tensor, FakeTensor):
            return self._node_of[id(self._constant(tensor))]
        expected = self._expected.get(id(tensor))
        if node is None and expected is not None and expected.memory == storage_id(tensor):
            return self.placeholder(expected.name, tensor, expected.real, **expected.meta)
        for candidate in self._by_storage.get(storage_id(tensor), ()):
            if _same_view(candidate.meta["val"], tensor):
                return candidate
        raise CaptureError(
            f"a tensor of shape {tuple(tensor.shape)} entered the step unseen "
            f"({calling_line()}); it may come from a tensor subclass or a cached value"
        )

    def _constant(self, tensor: torch.Tensor) -> torch.Tensor:
        """The stand-in of a tensor that the code brings along."""
        if id(tensor) in self._twin_of:
            return self._twin_of[id(tensor)]
        if tensor.requires_grad:
            raise CaptureError(
                f"a tensor of shape {tuple(tensor.shape)} that requires grad is used in forward "
                f"({calling_line()}) but is not a parameter of the model; register it as one"
            )
        self._refuse_undense(tensor)
        name = f"constant_{len(self.constants)}"
        self.constants[name] = tensor
        node = self.graph.placeholder(name)
        node.meta.update(role="constant", target=name)
        twin = self._twin_of[id(tensor)] = self._twin(tensor)
        self.bind(node, twin)
        return twin

    def _with_twins(self, func: Any, tree: Any) -> Any:
        """Arguments with stand-ins in place of real tensors; views of one then share memory."""
        if func is torch.ops.aten.lift_fresh.default:  # PyTorch keeps its value
            return tree
        given = [x for x in tree_iter(tree) if isinstance(x, torch.Tensor)]
        if all(isinstance(x, FakeTensor) for x in given):
            return tree

        def twin(x: Any) -> Any:
            real = isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)
            return self._constant(x) if real else x

        return tree_map(twin, tree)

    def _refuse_undense(self, tensor: torch.Tensor) -> None:
        if tensor.layout != torch.strided or tensor.is_nested:
            refuse_result(tensor, self.origin()[1], self.phase)

    def bind(self, node: Node, tensor: torch.Tensor) -> None:
        """Record that ``node`` makes ``tensor``."""
        self._refuse_undense(tensor)
        node.meta["val"] = tensor
        self._memory_of[id(tensor)] = storage_id(tensor)
        self._keep_alive.append(tensor)
        self._node_of[id(tensor)] = node
        self._by_storage.setdefault(storage_id(tensor), []).append(node)

    def source_of(self, tensor: torch.Tensor) -> str:
        """The line that made a tensor of the step."""
        node = self._node_of.get(id(tensor))
        return str(node.meta.get("source", node.name)) if node is not None else "unknown line"

    def has_made(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor takes part in the step."""
        return id(tensor) in self._node_of

    def is_state(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a parameter, a buffer or an attribute, and no result of the step."""
        node = self._node_of.get(id(tensor))
        if node is None:
            return id(tensor) in self._expected
        return node.op == "placeholder" and node.meta["role"] != "input"

    def lies_in_state(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's memory is a buffer's or an attribute's."""
        return any(
            node.op == "placeholder" and node.meta["role"] in ("buffer", "attribute")
            for node in self._by_storage.get(storage_id(tensor), ())
        )

    def is_known(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is made only of constants, so that every step makes the same one."""
        return self._known.value_of(tensor) is not None

    def let_go(self) -> None:
        """Drop the callbacks: what was recorded may outlive the model."""
        self._on_call = lambda: None

    def knowing(self) -> ReplayAnswersMode:
        """Return a mode that knows the values known so far, and records nothing."""
        return ReplayAnswersMode(
            self._known.copy(), self.questions.outcomes, self.questions.unknown
        )

    def read_whole(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """All values of a stand-in that the code reads outside of PyTorch."""
        known = self._known.value_of(tensor)
        return known if known is not None else self.questions.read(tensor)

    def asked_number(self, tensor: torch.Tensor) -> AskedNumber | None:
        """A number that is read only when it matters; ``None`` if its value is known anyway."""
        if self.phase != "forward" or tensor.dtype == torch.bool or tensor.is_complex():
            return None
        if self._known.value_of(tensor) is not None:
            return None
        return self.questions.asked_number(tensor)

    # -- what is dispatched ------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if are_spread(types):
            return NotImplemented  # it computes on this process's parts, which come here again
        with not_watched():
            return self._dispatched(func, args, kwargs or {})

    def _dispatched(self, func: Any, args: tuple, kwargs: dict) -> Any:
        if not isinstance(func, OpOverload):
            raise CaptureError(f"{func} cannot be recorded ({calling_line()})")
        refuse_nesting(func, calling_line)
        refuse_in_place(func, self.phase, calling_line)
        self._on_call()
        args, kwargs = self._with_twins(func, (args, kwargs))
        if is_wait(func):
            return self._ended(args[0])
        if self._known.answers(func, args):
            return self._known.number(args)
        if torch.Tag.inplace_view in func.tags and schema_of(func).name != "aten::set_":
            return self._inplace_view(func, args, kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            refuse_other_generators(args, kwargs)
            self.check_generators()
            self.generators.draw()
        if func is PACK and isinstance(args[1], FakeTensor):
            lengths = self.read_whole(args[1])
            if lengths is not None:
                out = packed(args[0], lengths, args[2])
                self.record(func, args, kwargs, out)
                self._look_at_stand_in(out[1], args[0].fake_mode)
                return out
        outs = [] if func in _EXCHANGES else written_arguments(func, args, kwargs)
        sizes = [tensor.shape for tensor in outs]
        try:
            if self._repeated is None:
                out = _apart(func, func(*args, **kwargs))
            else:
                out = _apart(func, self._repeated.run(func, args, kwargs))
            out = laid_out_rightly(func, args, out)
        except ASKS as error:
            self.failed_at = self.origin()[1]
            return self.questions.answer(func, args, kwargs, error)
        except (RuntimeError, NotImplementedError):
            out = kernels_word(func, args, kwargs)
            if out is None:
                self.failed_at = self.origin()[1]
                raise
        except Exception:
            self.failed_at = self.origin()[1]
            raise
        for tensor, size in zip(outs, sizes, strict=True):
            self._refuse_resized(tensor, size)
        if func in _ASSERTIONS:
            self.call(func, self.as_nodes(args), self.as_nodes(kwargs)).meta["val"] = None
        elif any(isinstance(o, torch.Tensor) for o in tree_iter(out)) or schema_of(func).is_mutable:
            self.record(func, args, kwargs, out)
        return out

    def _ended(self, result: torch.Tensor) -> torch.Tensor:
        """Record the end of a collective."""
        node = self.node_of(result)
        made_by = node.args[0] if node.target is operator.getitem else node  # one of several
        read = made_by.all_input_nodes if isinstance(made_by, Node) else []
        self.call(ENDED, (node, read), {}).meta.update(val=None, writes=(node,))
        return result

    def _look_at_stand_in(self, real: torch.Tensor, fake_mode: FakeTensorMode) -> None:
        """Make views of a real tensor share memory: PyTorch makes them from its one stand-in."""
        node = self.node_of(real)
        with disable_current_modes():
            stand_in = fake_mode.fake_tensor_converter.from_real_tensor(fake_mode, real)
        self.bind(node, stand_in)

    def check_generators(self) -> None:
        """Refuse code that sets the state of torch's generators, even to an earlier state.

        Raises
        ------
        CaptureError
            When a generator's state is not the one after the last draw.
        """
        self.generators.check(self.phase)

    def _inplace_view(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """``x.squeeze_()`` changes what ``x`` is: record ``y = x.squeeze()``, go on with y."""
        tensor = args[0]
        source = self.node_of(tensor)
        size = tensor.shape
        frozen = tensor.detach()  # the node keeps its old shape
        source.meta["val"] = frozen
        self._keep_alive.append(frozen)
        node_args = self.as_nodes(args)
        out = func(*args, **kwargs)
        if schema_of(func).name in _RESIZES and source.op != "placeholder":
            self._refuse_resized(tensor, size)
            return out
        node = self.call(functional_twin(func), node_args, kwargs)
        self.bind(node, tensor)
        self._known.note(func, args, kwargs, out)  # its shape has changed
        return out

    def _refuse_resized(self, tensor: torch.Tensor, before: torch.Size) -> None:
        """Refuse a tensor whose memory grows: a plan counts the memory that it had."""
        if tensor.shape != before:
            raise CaptureError(
                f"a tensor of shape {tuple(before)} is resized in place to {tuple(tensor.shape)} "
                f"({calling_line()}), by resize_ or as out= of a call; make it in its size at "
                "once, or leave out= away"
            )

    def as_nodes(self, tree: Any) -> Any:
        """Arguments with nodes in place of tensors."""
        return tree_map(lambda x: self.node_of(x) if isinstance(x, torch.Tensor) else x, tree)

    def call(self, func: Any, args: Any, kwargs: Any) -> Node:
        """Append a call on nodes."""
        node = self.graph.call_function(func, tuple(args), dict(kwargs))
        module_path, source = self.origin()
        node.meta.update(phase=self.phase, module_path=module_path, source=source, writes=())
        return node

    def record(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        """Append a call that returned ``out``."""
        self._append(func, args, kwargs, out)
        self._known.note(func, args, kwargs, out)

    def _append(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        if func is torch.ops.aten.lift_fresh.default:  # returns a constant: copy it for each run
            func = torch.ops.aten.clone.default
        node = self.call(func, self.as_nodes(args), self.as_nodes(kwargs))
        node.meta["writes"] = tuple(self.node_of(t) for t in written_arguments(func, args, kwargs))
        if isinstance(out, torch.Tensor):
            self._bind_output(node, out)
            return
        node.meta["val"] = None
        leaves, _ = tree_flatten(out)
        if isinstance(out, (tuple, list)) and len(leaves) == len(out):
            for i, leaf in enumerate(out):
                if isinstance(leaf, torch.Tensor):
                    self._bind_output(self._getitem(node, i), leaf)
        elif any(isinstance(leaf, torch.Tensor) for leaf in leaves):
            raise CaptureError(f"{func} returns a nested structure ({calling_line()})")

    def _bind_output(self, node: Node, out: torch.Tensor) -> None:
        node.meta["val"] = out
        if id(out) in self._node_of:  # an in-place call that returns its argument
            return
        self.bind(node, out)

    def _getitem(self, node: Node, i: int) -> Node:
        item = self.graph.call_function(operator.getitem, (node, i))
        item.meta.update({**node.meta, "writes": ()})
        return item

    # -- where it comes from -------------------------------------------------

    def origin(self) -> tuple[str, str]:
        """Module path and source line; a backward call has those of its forward call."""
        return self._places.origin(self.phase)

    @contextmanager
    def module_paths(self, model: torch.nn.Module) -> Iterator[None]:
        """While active, calls know the submodule that they run in."""

        def look_outside() -> None:
            self.generators.look_outside(self._places.module_path)

        with self._places.inside_modules(model, look_outside):
            yield
            look_outside()  # for draws of the model's own forward after its last module


def _apart(func: OpOverload, out: Any) -> Any:
    """Outputs of a call that by its schema share no memory, as different tensors.

    Some fake kernels return one tensor twice where the real kernel returns two, as
    ``mkldnn_rnn_layer_backward`` does with the bias gradient.
    """
    if not isinstance(out, (tuple, list)) or any(r.alias_info for r in schema_of(func).returns):
        return out
    seen: set[int] = set()
    results = []
    for item in out:
        if isinstance(item, torch.Tensor) and id(item) in seen:
            item = torch.empty_strided(
                item.shape, item.stride(), dtype=item.dtype, device=item.device
            )
        seen.add(id(item))
        results.append(item)
    return type(out)(results)


def _same_view(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.shape == b.shape
        and a.stride() == b.stride()
        and a.storage_offset() == b.storage_offset()
        and a.dtype == b.dtype
    )
