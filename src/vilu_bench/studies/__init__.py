"""Benchmarks: methods on data sets, in several settings and with several seeds."""
