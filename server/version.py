"""Which onecopy this is."""

import importlib.metadata


def version() -> str:
    """As installed; a checkout that runs without being installed says so."""
    try:
        return importlib.metadata.version("onecopy")
    except importlib.metadata.PackageNotFoundError:
        return "0+uninstalled"
