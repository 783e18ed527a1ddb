"""Import this first to import the pack's own modules as `pack`, the name that the tests use, from any folder name.

The exact targets (oracles) and the published methods of the tests can be imported after it, too.
"""

from __future__ import annotations

import sys
import types

from comfy_process import ROOT

if "pack" not in sys.modules:
    pack = types.ModuleType("pack")
    pack.__path__ = [str(ROOT)]
    sys.modules["pack"] = pack
if str(ROOT / "tests") not in sys.path:
    sys.path.append(str(ROOT / "tests"))
