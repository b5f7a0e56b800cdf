"""Watermarks: the marks that keep one slot from being signed twice."""
