"""timm classifiers, the ECA ResNets above all: catalogue, weights, label names, fingerprint."""
