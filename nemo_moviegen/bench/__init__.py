"""Measuring: the same work done in several ways, in one run, in turns."""
