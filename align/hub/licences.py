"""What Meta's community licences ask of a model made with Llama weights. The texts are not copied:
they are linked, and a copy that lies in the base's folder is sent along."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

NAMED = re.compile(r"(?i)(?:^|/)(?:meta-)?llama[-_]?(?:guard[-_])?(\d)(?:\.(\d))?(?![\db])")
VOCABULARY = 128256
"""Rows of the embedding of every Llama 3: a copy under another name is still Llama."""


@dataclass(frozen=True)
class Licence:
    """One version of the licence."""

    hub: str
    """Identifier in a model card."""
    version: str
    page: str

    @property
    def built_with(self) -> str | None:
        """The words that have to be shown."""
        words = {"2": None, "3": "Built with Meta Llama 3"}
        return words.get(self.version, "Built with Llama")

    @property
    def prefix(self) -> str:
        """How the name of a derived model has to begin."""
        return {"2": "", "3": "Llama 3"}.get(self.version, "Llama")

    @property
    def notice(self) -> str:
        """The attribution that goes with every copy."""
        name = f"Meta Llama {self.version}" if self.version == "3" else f"Llama {self.version}"
        return (
            f"{name} is licensed under the {name} Community License, "
            "Copyright © Meta Platforms, Inc. All Rights Reserved.\n"
        )

    def allows(self, name: str) -> bool:
        """Whether a repository's name begins as it must; case and separators do not matter."""
        plain = re.sub(r"[\W_]", "", name).lower()
        return plain.startswith(re.sub(r"\W", "", self.prefix).lower())


PAGES = {
    "2": "https://ai.meta.com/llama/license/",
    "3": "https://www.llama.com/llama3/license/",
    "3.1": "https://www.llama.com/llama3_1/license/",
    "3.2": "https://www.llama.com/llama3_2/license/",
    "3.3": "https://www.llama.com/llama3_3/license/",
    "4": "https://www.llama.com/llama4/license/",
}
LICENCES = {version: Licence(f"llama{version}", version, page) for version, page in PAGES.items()}


def llama_licence(names: Iterable[str], config: Mapping[str, Any]) -> Licence | None:
    """The licence that binds a model, by the names of its bases and the base's own config.

    Returns:
        None for a model that stands on no Llama weights; Llama architecture alone is no sign.
    """
    for name in names:
        found = NAMED.search(name)
        version = ".".join(filter(None, found.groups())) if found else ""
        if version in LICENCES:
            return LICENCES[version]
    if config.get("model_type") == "llama" and config.get("vocab_size") == VOCABULARY:
        scaled = (config.get("rope_scaling") or config.get("rope_parameters") or {}).get("factor")
        if scaled is None:
            return LICENCES["3"]
        return LICENCES["3.2"] if config.get("tie_word_embeddings") else LICENCES["3.1"]
    return None
