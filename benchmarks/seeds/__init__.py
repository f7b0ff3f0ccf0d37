"""The seeds of the field, reproduced by prediction: ``python -m benchmarks.seeds``.

``chains`` is Chen et al.'s square root, ``checkmate`` the experiments of Jain et
al., ``half`` the usual guides' half of the memory for a fifth of the time.
"""
