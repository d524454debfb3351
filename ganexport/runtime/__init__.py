"""Runners: one engine running one file of an artifact, without torch."""

from ganexport.registry import Registry

#: Every backend by name; each module holds one :class:`~ganexport.runtime.base.Runner` as ``RUNNER``.
BACKENDS = Registry("ganexport.runtime", "backend", exclude=("base", "generator"))
