"""PEFT's own test suite, run for our methods: `make peft-suite`."""
