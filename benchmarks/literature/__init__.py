"""Experiments of the literature, reproduced by prediction: ``python -m benchmarks.literature``.

``chains`` is Chen et al.'s square root, ``checkmate`` the experiments of Jain et
al., ``half`` the usual guides' half of the memory for a fifth of the time.
"""
