"""Numbers about a quantized model: verification, evaluation, fidelity, diagnosis."""
