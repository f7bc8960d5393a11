"""Quantization-aware training: fake quantizers and the loop that fine-tunes with them."""
