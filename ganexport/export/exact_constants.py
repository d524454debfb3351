"""The exporter's optimiser takes x + 1e-8 for x + 0, and deletes it: constants are compared exactly meanwhile.

onnxscript matches the constants of its rewriting rules within 1e-8. An epsilon of a division or a logarithm is that
small (StyleGAN's demodulation, pixel normalisation, masked pooling), and without it a zero gives NaN, at inputs that no
certificate may happen to draw.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def exact_constants() -> Iterator[None]:
    """No tolerance in the patterns of onnxscript's rules, for the time being."""
    try:
        from onnxscript.rewriter._pattern_ir import Constant
    except ImportError:  # another onnxscript keeps its patterns elsewhere; tests/export/test_awkward.py would tell
        yield
        return
    # Data descriptors of the class come before what instances have noted.
    exact = property(lambda _self: 0.0, lambda _self, _value: None)
    for name in ("_rel_tol", "_abs_tol"):
        setattr(Constant, name, exact)
    try:
        yield
    finally:
        for name in ("_rel_tol", "_abs_tol"):
            delattr(Constant, name)
