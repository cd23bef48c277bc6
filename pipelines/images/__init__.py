"""Decoding and preprocessing: encoded bytes to the uint8 input of a model.

Most modules do not import torch, so that decoding tasks start quickly.
"""
