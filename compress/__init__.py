"""compress: post-training compression of language models."""
