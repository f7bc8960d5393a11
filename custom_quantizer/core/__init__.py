"""What all else stands on: formats, quantization parameters, exact arithmetic, graphs, files."""
