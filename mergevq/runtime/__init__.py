"""Everything a run needs, no matter what it trains: files, logs, ranks, random numbers."""
