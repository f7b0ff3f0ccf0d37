"""What tests and benchmarks share: small models of every kind, and bits compared.

It lies here and not under ``tests``, because tests may import benchmarks but not the
other way round. Like all benchmarks, it is not part of the wheel.
"""
