"""pytest-benchmark suite over the cases of attention; see op_bench.py.

pytest benchmarks/bench_attention.py -k additive --benchmark-json out.json
"""

from benchmarks.op_bench import make_test

test_attention = make_test("attention")
