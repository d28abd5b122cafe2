"""Training on top of the layers: truncated BPTT, and the `demo` and `verify` commands.

A user of the layers, like any program outside this package: `import seqkern` never imports it.
"""
