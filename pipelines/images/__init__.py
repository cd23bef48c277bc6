"""From encoded bytes to the uint8 pixels that a model is fed. Imports no torch: decoding tasks start in a blink."""
