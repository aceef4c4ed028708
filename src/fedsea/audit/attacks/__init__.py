"""One file an attack, A0 to A10 of the audit; mathematics that several need, on plain tensors."""
