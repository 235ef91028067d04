"""Tests of the built site. They run in the environment `docs`, which `ci/docs.sh` makes."""

from __future__ import annotations

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("hawkmoth") else ["test_*.py"]
