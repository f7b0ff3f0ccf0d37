"""What an operator is: its schema, its overloads, and the functions beside it."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch._ops import (
    OpOverload,  # 2.11+; one operator, as a dispatch mode gets it
    OpOverloadPacket,  # 2.11+; all overloads of a name
)
from torch.fx.node import _get_qualified_name

# 2.11+; name, arguments, what is written and what aliases what
schema_of = attrgetter("_schema")
# 2.11+; "Tensor" of aten.add.Tensor, "default" where it has none
overload_name_of = attrgetter("_overloadname")
# 2.11+; aten.add of aten.add.Tensor
packet_of = attrgetter("_overloadpacket")
# 2.11+; whether an operator has a kernel of its own for a dispatch key
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
# 2.11+; registrations of kernels that end with a ``with`` block
temporary_library = torch.library._scoped_library
# 2.11+; the name under which generated code calls a function
qualified_name_of = _get_qualified_name

_C: Any = torch._C  # its stubs lack some of these
# 2.11+; bindings that come to an operator faster than torch.ops does
FUNCTION_TABLES: tuple[Any, ...] = (
    _C._VariableFunctions,
    _C._nn,
    _C._linalg,
    _C._fft,
    _C._special,
)

__all__ = [
    "FUNCTION_TABLES",
    "OpOverload",
    "OpOverloadPacket",
    "has_kernel",
    "overload_name_of",
    "packet_of",
    "qualified_name_of",
    "schema_of",
    "temporary_library",
]
