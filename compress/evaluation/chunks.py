"""How many logits are made at a time. Apart, so that the plan can know it without torch."""

LOGIT_BYTES = 8 * 2**20  # of one chunk of float32 logits: within a cache …
MIN_CHUNK_TOKENS = 512  # … but no fewer tokens than this, over which the cost of converting the head is spread
