"""Benchmarks of encdec_fast beside its peers; see benchmarks/README.md."""
