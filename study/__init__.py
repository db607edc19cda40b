"""Does it pay? See README.md."""

import plumbing.early  # noqa: F401
