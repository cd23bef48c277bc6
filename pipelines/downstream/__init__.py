"""What is done with a model or its output once it is there."""
