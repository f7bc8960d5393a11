"""What users ask for: rules by scope, their precedence, and the files that hold them."""
