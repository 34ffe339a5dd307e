"""Plain torch, any floating dtype, differentiable: the meaning of every op."""
