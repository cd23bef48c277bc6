"""The ECA ResNets of timm, and any other timm classifier: catalogue, weights, label names, fingerprint."""
