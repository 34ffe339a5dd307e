"""The doctests of an integration run where its library is installed."""

from __future__ import annotations

collect_ignore: list[str] = []

try:
    import dlcore.integrations.transformers  # noqa: F401
except ImportError:
    collect_ignore.append("transformers")
