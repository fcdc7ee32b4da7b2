"""The package as pip installs it."""

import subprocess
import sys
import tomllib
import zipfile

import pytest


@pytest.mark.slow
def test_a_wheel_holds_the_package_and_works_from_another_folder(root, tmp_path):
    """Guards: a package that cannot be built, or whose recipes and page template stay behind."""
    clone = tmp_path / "clone"
    files = subprocess.run(["git", "-C", str(root), "ls-files"], capture_output=True, text=True, check=True).stdout
    for name in files.splitlines():
        if (root / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            (clone / name).write_bytes((root / name).read_bytes())
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path),
                    str(clone)], check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    packaged = {name for name in files.splitlines() if name.startswith("plotarmour/")}
    assert {str(path.relative_to(installed).as_posix()) for path in (installed / "plotarmour").rglob("*.*")} >= packaged
    code = "import plotarmour.config as c; print(c.__file__, c.load_recipe('tiny', 'bdh').training.max_steps)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(installed)}, check=True,
                          capture_output=True, text=True)
    assert done.stdout.startswith(str(installed)) and done.stdout.endswith(" 2200\n")


def test_every_folder_with_code_is_a_package_of_the_wheel(root):
    """Guards: a new room that is missing in what pip installs."""
    listed = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in (root / "plotarmour").rglob("*") if path.suffix in (".py", ".toml")}
    assert sorted(listed) == sorted(str(folder.relative_to(root).as_posix()).replace("/", ".") for folder in folders)


def test_extras_have_the_ranges_that_are_tested(root):
    """Guards: an extra and the requirements of the tests that name different versions of one package."""
    extras = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    stated = (root / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    assert [package for packages in extras.values() for package in packages if package not in stated] == []
