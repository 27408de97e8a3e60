"""What a package index shows, which depends on where the repository is: `REPO_URL` says it,
and `SITE_URL` where the documents are published, if they are."""

import os
import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface


class Addresses(MetadataHookInterface):
    def update(self, metadata: dict) -> None:
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        repository = os.environ.get("REPO_URL", "").rstrip("/")
        if repository:
            files = f"{repository}/blob/v{metadata['version']}"
            text = re.sub(r"\]\((?!https?:|#)", f"]({files}/", text)
            metadata["urls"] = {
                "Documentation": os.environ.get("SITE_URL") or f"{files}/docs",
                "Repository": repository,
                "Issues": f"{repository}/issues",
                "Changelog": f"{files}/CHANGELOG.md",
            }
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
