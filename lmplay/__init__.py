"""lmplay: find out in minutes whether a language-model idea beats a baseline.

Importing this package imports nothing heavy; the commands import what they need when they need it.
"""

__version__ = "0.2.0"
