"""Rewrites of captured graphs: ops as other ops with the same values."""
