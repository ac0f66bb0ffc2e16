"""What several test modules share. `tests` is on the path, so tests, kernels and scripts import it as `support`."""
