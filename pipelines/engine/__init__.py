"""The Ray Data chain that inference, evaluation and benchmark share: plan, fetch, decode, predict."""
