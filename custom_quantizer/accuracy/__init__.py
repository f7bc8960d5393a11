"""Better integers after training: what is lost by rounding, made up for layer by layer."""
