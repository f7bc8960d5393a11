"""Runtimes that programs are made for; the only packages that import executorch."""
