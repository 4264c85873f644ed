"""What `fastnorm bench` and `pytest bench/` share: layers, libraries, interleaved timing."""
