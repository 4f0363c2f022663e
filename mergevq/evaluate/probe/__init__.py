"""Probes of the representation."""
