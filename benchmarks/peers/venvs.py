"""Virtual environments of peers that can't share ours."""

import subprocess
import sys
import sysconfig

from peers.apart import HERE, INSTALLED, NotInstalledError


def python_of(name: str, *, install: bool = True) -> str:
    """The interpreter of build/peers/NAME, which is made where it is missing or out of date.

    It has the packages that NAME.txt lists and, behind them, our own (the same torch).

    Raises:
        NotInstalledError: it can't be installed, or install is False and it isn't.
    """
    listed = HERE / f"{name}.txt"
    folder, wanted = INSTALLED / name, listed.read_text(encoding="utf-8")
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return str(python)
    if not install:
        raise NotInstalledError("not installed; run without --no-install")
    print(f"installing {name} into {folder} …", file=sys.stderr, flush=True)
    _run(sys.executable, "-m", "venv", "--clear", str(folder))
    _run(str(python), "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(listed))
    (own,) = folder.glob("lib/python*/site-packages")
    # After its own packages, ours.
    (own / "zz_ours.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    stamp.write_text(wanted, encoding="utf-8")
    return str(python)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (lines or done.stderr.strip().splitlines() or ["without a word"])[-1]
        raise NotInstalledError(f"{' '.join(command[1:4])} failed: {reason}")
