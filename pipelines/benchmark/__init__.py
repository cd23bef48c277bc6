"""The ceilings of each stage of labelling, and what the whole makes of them."""
