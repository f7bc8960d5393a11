"""PT2E quantization with per-op integer formats and an explicit int32 bias."""
