"""Writes tests/golden/studio_zip anew, when the format is meant to change: `python tests/export/make_golden.py`.

The folder holds the zip's files as they lie in it, so that a change can be read, and the SAE that went in.
"""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from export_data import ABOUT, FEATURES, saelens_folder

from mistudio_engine.export.feature_json import ExportOptions
from mistudio_engine.export.studio_zip import write_zip

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "studio_zip"
OPTIONS = ExportOptions(logit_lens_k=2, histogram_bins=2, top_tokens_k=1)


def main() -> None:
    """Replace the folder."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path = folder / "golden.zip"
        sae = saelens_folder(folder / "sae")
        list(write_zip(path, ABOUT, FEATURES, n_features=len(FEATURES), options=OPTIONS, saelens_folder=sae))
        shutil.rmtree(GOLDEN, ignore_errors=True)
        with zipfile.ZipFile(path) as archive:
            archive.extractall(GOLDEN)


if __name__ == "__main__":
    main()
