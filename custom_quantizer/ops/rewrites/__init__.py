"""Spellings: ops that are written in other ops, with the same values."""
