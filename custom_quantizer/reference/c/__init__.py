"""C code of a network: memory, text and calls; and the kernels, which are C files."""
