"""Generation on a GPU: decoder and search as one captured CUDA graph, step after step.

scores.py       what may follow a hypothesis: constraints, draws
search.py       hypotheses as tensors: what stays open, what has ended
weights.py      a decoder's weights, and the products with them
recurrent.py    a step of a recurrent decoder
decode_step.py  the same as one launch, for few rows
transformer.py  a step of a Transformer decoder
run.py          sessions, their graphs, and the loop that replays them
"""

from encdec_fast.generation.device.decode_step import why_not as why_not_one_launch
from encdec_fast.generation.device.run import DTYPES, release, run, why_not

__all__ = ["DTYPES", "release", "run", "why_not", "why_not_one_launch"]
