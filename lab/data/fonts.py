"""Font families of print, from pinned packages: `python -m lab.data.fonts` fetches them into `lab/cache/fonts`.

`fonts.tsv` lists family, package, version, licence and split. Packages whose name begins with "@" come from npm, the
others from PyPI; the files of matplotlib are read where it is installed.
"""

import csv
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple


CACHE = Path(__file__).parents[1] / "cache" / "fonts"
SPLITS = ("train", "held_out")
STYLES = re.compile(r"_(300Light|400Regular|400Regular_Italic|500Medium|600SemiBold|700Bold)\.ttf$|^Caladea-\w+\.ttf$")
MATPLOTLIB_FILES = {
    "dejavu-sans": r"DejaVuSans(-\w+)?\.ttf",
    "dejavu-serif": r"DejaVuSerif(-\w+)?\.ttf",
    "dejavu-sans-mono": r"DejaVuSansMono(-\w+)?\.ttf",
    "stix": r"STIXGeneral(Bol|Italic)?\.ttf",
}


class Family(NamedTuple):
    """A row of `fonts.tsv`."""

    name: str
    package: str
    version: str
    licence: str
    split: str

    def files(self) -> list[Path]:
        """
        The font files, sorted; styles from light to bold and a regular italic.

        Raises:
            FileNotFoundError: if the family is not fetched.
        """
        if self.package == "matplotlib":
            import matplotlib

            folder, pattern = Path(matplotlib.get_data_path(), "fonts", "ttf"), MATPLOTLIB_FILES[self.name]
            return sorted(file for file in folder.iterdir() if re.fullmatch(pattern, file.name))
        files = sorted((CACHE / self.name).glob("*.ttf"))
        if not files:
            raise FileNotFoundError(f"{CACHE / self.name} has no fonts: `python -m lab.data.fonts` fetches them")
        return files

    def fetch(self) -> None:
        """
        Downloads the package and unpacks its font files into the cache.

        Raises:
            RuntimeError: if npm or pip fails.
        """
        with tempfile.TemporaryDirectory() as folder:
            if self.package.startswith("@"):
                command = ["npm", "pack", "--silent", f"{self.package}@{self.version}", "--pack-destination", folder]
            else:
                command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder]
                command += [f"{self.package}=={self.version}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-300:]}")
            (archive,) = Path(folder).iterdir()
            with zipfile.ZipFile(archive) if archive.suffix == ".whl" else tarfile.open(archive) as packed:
                is_zip = isinstance(packed, zipfile.ZipFile)
                names, open_member = (
                    (packed.namelist(), packed.open) if is_zip else (packed.getnames(), packed.extractfile)
                )
                unpacked = Path(folder, "fonts")
                unpacked.mkdir()
                for name in names:
                    if STYLES.search(Path(name).name):
                        (unpacked / Path(name).name).write_bytes(open_member(name).read())
            shutil.rmtree(CACHE / self.name, ignore_errors=True)
            CACHE.mkdir(parents=True, exist_ok=True)
            shutil.move(unpacked, CACHE / self.name)


@lru_cache
def list_families() -> tuple[Family, ...]:
    """All families of `fonts.tsv`."""
    with Path(__file__).with_name("fonts.tsv").open(newline="") as file:
        rows = csv.reader(file, delimiter="\t")
        next(rows)
        return tuple(Family(*row) for row in rows)


@lru_cache
def font_files(split: str) -> dict[str, list[Path]]:
    """The font files of each family of a split, "train" or "held_out"."""
    return {family.name: family.files() for family in list_families() if family.split == split}


def main() -> None:
    families = [family for family in list_families() if family.package != "matplotlib"]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(Family.fetch, families))
    for split in SPLITS:
        files = font_files(split)
        print(f"{split}: {len(files)} families, {sum(map(len, files.values()))} files in {CACHE}")


if __name__ == "__main__":
    main()
