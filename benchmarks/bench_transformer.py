"""pytest-benchmark suite over the cases of a Transformer's encoder; see op_bench.py.

pytest benchmarks/bench_transformer.py -k "int8 and padded"
"""

from benchmarks.op_bench import make_test

test_transformer = make_test("transformer")
