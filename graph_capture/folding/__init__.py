"""Fold the calls of a traced step into operators and storages, with their prices."""
