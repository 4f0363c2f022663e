"""Settings of everything, as frozen values that check themselves; no torch."""
