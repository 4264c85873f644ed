"""nn.Modules: parameters and buffers, no tensor arithmetic; one file a family."""
