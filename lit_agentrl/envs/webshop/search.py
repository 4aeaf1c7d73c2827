"""How many products a search gives.

The official site searches with Lucene (k1 = 0.9, b = 0.4, English stop words, Porter stems). `lit_agentrl.retrieval`
computes the same scores; it cuts plural endings instead of Porter's stemming.
"""

from __future__ import annotations

MAX_RESULTS = 50
RESULTS_PER_PAGE = 10
