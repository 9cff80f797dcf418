"""The mathematics of alignment as pure functions of tensors, a file for each textbook concept."""
