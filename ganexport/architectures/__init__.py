"""Generators and discriminators, one file each.

A module here defines ``Options`` (a frozen msgspec struct, every field with a default), ``generator(options)``,
``discriminator(options)`` and ``spec(options)``. Generators return one image tensor [N, C, H, W] in (-1, 1) from
``forward(z)`` or ``forward(z, labels)``; discriminators return raw logits [N] from ``forward(images)`` or
``forward(images, labels)``.
"""

from ganexport.registry import Registry

ARCHITECTURES = Registry("ganexport.architectures", "architecture")
