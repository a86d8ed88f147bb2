"""Which implementation runs an op, why, and how to ask for another.

An op lists its backends from the fastest to the reference. The first one that has nothing against a
call runs it; `explain` tells what each had to say, `use_backend` and the environment variable
`ENCDEC_FAST_BACKEND` (read once, when the package is imported) ask for one by name.
"""

from encdec_fast.backends.explanation import Description, Explanation, explain, explained_by
from encdec_fast.backends.library import LibraryStatus, status
from encdec_fast.backends.selection import (
    Backend,
    BackendRefused,
    requested_backend,
    select,
    use_backend,
    verdicts,
)

__all__ = [
    "Backend",
    "BackendRefused",
    "Description",
    "Explanation",
    "LibraryStatus",
    "explain",
    "explained_by",
    "requested_backend",
    "select",
    "status",
    "use_backend",
    "verdicts",
]
