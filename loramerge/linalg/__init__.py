"""Numerics of factored matrices: no out x in matrix is ever formed here."""
