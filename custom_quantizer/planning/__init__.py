"""What becomes of every op and tensor: the planner, and the quantizer that applies its plan."""
