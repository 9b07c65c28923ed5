"""Families that exist for the tests alone, one folder each; found beside the package's own once this is imported."""

from pathlib import Path

import transpixeler.families

_HERE = str(Path(__file__).parent)
if _HERE not in transpixeler.families.__path__:
    transpixeler.families.__path__.append(_HERE)
