"""Several tokens drafted and checked in one pass of a generator."""
