"""Files for tools that know nothing of this package: ONNX graphs and encodings."""
