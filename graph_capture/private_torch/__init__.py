"""The one door to what PyTorch keeps private.

Every private name of PyTorch that this project relies on is named here, once, with its
purpose and the PyTorch that has it: "2.11+" says that it exists from the oldest
supported version on, and may be older. Everything else imports from here, and
``tests/graph_capture/test_private_torch.py`` tries each name and finds other uses of
private names.

This file imports nothing, so that importers pay only for what they use:

- ``trees``: nested arguments; ``tensors``: what lies beneath a tensor
- ``operators``: what an operator is; ``aten``: operators whose names are private
- ``dispatch``: modes and guards; ``fake_tensors``: tensors without memory
- ``autograd``: nodes, the engine, the state of a thread
- ``modules``: the tables of ``nn.Module``, and of what wraps one
- ``settings``: of the process; ``devices``: of CUDA; ``profiler``: what allocators report
- ``replacing``: functions of PyTorch that are replaced while a step is captured
- ``sharding``: what ``fully_shard`` leaves; ``processes``: what the processes of a job share
- ``compiler``: what ``torch.compile`` partitions and compiles with; ``inductor``: the code that it
  generates, ``inductor_codes``: that once, ``inductor_fusion``: with which kernels joined,
  ``joined_kernels``: as one C++ program; ``compiled_calls``: calls of what is compiled
- ``module_program``: PyTorch's own integer program over modules
"""
