"""Is an idea better than its baseline? Designs, paired runs, statistics and verdicts."""
