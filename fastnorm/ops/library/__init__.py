"""The launchers of `fastnorm.kernels` as torch.library operators: same functions, same arguments.

Whoever records a graph instead of running it (torch.compile, torch.export, a dispatch mode) gets
these. They are opaque: what they allocate is all that is known of them, and their arguments have
the types of a schema. A dispatcher's call takes 5 µs, so other calls launch the kernels themselves.
"""
