"""vLLM plugin of fv-steer. The entry point is `register:register`."""
