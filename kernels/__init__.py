"""Kernels behind the ops: one module per op. Nothing is imported from here at package import."""
