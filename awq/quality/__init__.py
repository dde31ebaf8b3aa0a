"""Quality: perplexity, KL divergence, the report, the tables."""
