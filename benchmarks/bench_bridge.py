"""pytest-benchmark suite over the cases of the attention decoder and the bridges; see op_bench.py.

pytest benchmarks/bench_bridge.py -k "decoder"
"""

from benchmarks.op_bench import make_test

test_bridge = make_test("bridge")
