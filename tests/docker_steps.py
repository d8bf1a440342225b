"""The Dockerfile's steps as a shell script, for machines without Docker: in a new folder, with this machine's Python.

usage: python tests/docker_steps.py    runs them, and the image's command; exit status 0 where all of it worked

What needs root is left out: the compiler that apt-get brings must be there, and the user is the one who runs this.
"""

import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
HOME = "/home/flashcore"
NEEDS_ROOT = ("apt-get ", "useradd ")


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """The Dockerfile's instructions, each with its arguments as one line."""
    lines = [line for line in dockerfile.splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], " ".join(line.split()[1:])) for line in joined.splitlines() if line.strip()]


def script(dockerfile: str, home: Path) -> str:
    """The steps as bash, with the repository as the build context and `home` in the place of the image's HOME.

    Raises:
        ValueError: an instruction that this does not know, or a copy out of nothing.
    """
    lines = ["set -euo pipefail"]
    for name, arguments in instructions(dockerfile):
        arguments = arguments.replace(HOME, str(home))
        if name == "RUN" and not arguments.startswith(NEEDS_ROOT):
            # An image's shell begins anew at each step; what one step sets must not help the next.
            lines.append(f"( {arguments} )")
        elif name == "ENV":
            lines.append(f"export {arguments}")
        elif name == "WORKDIR":
            lines.append(f"mkdir -p {arguments}; cd {arguments}")
        elif name == "COPY":
            lines += _copy(arguments)
        elif name == "CMD":
            lines.append(shlex.join(json.loads(arguments)))
        elif name not in ("RUN", "FROM", "USER", "ARG"):
            raise ValueError(f"{name}: an instruction that {Path(__file__).name} cannot run")
    return "\n".join(lines) + "\n"


def _copy(arguments: str) -> list[str]:
    *sources, target = re.sub(r"--\S+ ", "", arguments).split()
    missing = [source for source in sources if not (ROOT / source).exists()]
    if missing:
        raise ValueError(f"COPY {arguments}: there is no {', '.join(missing)}")
    # A folder's contents go into the target, as Docker does it.
    lines = (
        [f"mkdir -p {target}"] if target.endswith("/") or any((ROOT / source).is_dir() for source in sources) else []
    )
    for source in sources:
        path = shlex.quote(str(ROOT / source)) + ("/." if (ROOT / source).is_dir() else "")
        lines.append(f"cp -r {path} {target}")
    return lines


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        text = script((ROOT / "Dockerfile").read_text(), Path(folder) / "home")
        # An own Python's folders must not stand in for what the image lacks.
        return subprocess.run(["env", "-u", "PYTHONPATH", "bash", "-x", "-c", text], cwd=folder).returncode


if __name__ == "__main__":
    sys.exit(main())
