"""Jobs that use a trained model or the output of `infer`."""
