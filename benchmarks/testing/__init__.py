"""What tests and benchmarks share: small models of every kind, and bits compared.

It lies here and not under ``tests``, since tests may import benchmarks and not the
other way round. Like all benchmarks, it is no part of the wheel.
"""
