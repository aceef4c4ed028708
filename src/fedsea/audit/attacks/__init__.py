"""One file an attack, A0 to A9 of the audit; mathematics that several need, on plain tensors."""
