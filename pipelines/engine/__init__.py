"""Ray Data pipeline shared by inference, evaluation and benchmark: plan, fetch, decode, predict."""
