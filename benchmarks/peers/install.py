"""Puts the extra `bench` into .venv-bench, which sees all that .venv has; run by `make bench` with .venv's Python.

hydra, which AReaL imports, needs an antlr under which Math-Verify misreads: the two go into a directory of their own,
.venv-bench/hydra, for processes that measure AReaL and nothing else.
"""

import subprocess
import sysconfig
from importlib.metadata import requires
from pathlib import Path

base = Path(sysconfig.get_path("purelib"))
python = Path(".venv-bench/bin/python").absolute()
own = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
Path(own.strip(), "base.pth").write_text(f"import site; site.addsitedir({str(base)!r})\n")
peers = [
    line.split(";")[0].strip() for line in requires("or1_megatron") or () if "extra ==" in line and "bench" in line
]
apart = [name for name in peers if name.startswith(("hydra", "antlr4"))]
install = [python, "-m", "pip", "--disable-pip-version-check", "install", "-qq", "--no-deps"]
subprocess.run([*install, *(name for name in peers if name not in apart)], check=True)
subprocess.run([*install, "--upgrade", "--target", ".venv-bench/hydra", *apart], check=True)
