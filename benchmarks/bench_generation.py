"""pytest-benchmark suite over the cases of generation; see op_bench.py.

pytest benchmarks/bench_generation.py -k "recurrent"
"""

from benchmarks.op_bench import make_test

test_generation = make_test("generation")
