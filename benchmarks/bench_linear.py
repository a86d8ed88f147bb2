"""pytest-benchmark suite over the cases of linear; see op_bench.py.

pytest benchmarks/bench_linear.py -k "bfloat16 and 640"
"""

from benchmarks.op_bench import make_test

test_linear = make_test("linear")
