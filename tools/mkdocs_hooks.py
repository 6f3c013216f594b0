"""While the site is built: adds the API reference, which exists nowhere but in the server's schema."""

from __future__ import annotations

import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools.api_reference import reference, schema


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """mkdocs calls this once it knows the pages."""
    files.append(File.generated(config, "reference.md", content=reference(schema())))
    return files
