"""Training methods: each is a short list of phases over the same loop."""
