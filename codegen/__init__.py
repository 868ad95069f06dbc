"""Code generation: Graph -> Program -> TIR kernels, model.c and weights -> model.so."""
