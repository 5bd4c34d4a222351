"""The demo's processor, once there is no file ``hold`` beside the run that it is to read."""

from __future__ import annotations

import runpy
import sys
import time
from pathlib import Path
from typing import Final

HOLD: Final = "hold"

if __name__ == "__main__":
    while (Path(sys.argv[2]).parent / HOLD).exists():
        time.sleep(0.05)
    runpy.run_module("caxev.demo.processor", run_name="__main__")
