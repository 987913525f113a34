"""A process of align before the libraries come: what they read from the environment, and what they may say."""

import gc
import sys

QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    # Threads that wait for each other in a busy loop crawl beside another process.
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYDANTIC_DISABLE_PLUGINS": "__all__",
}
"""Defaults of the libraries' environment: no telemetry, no bars and notes between our own lines, no
search through all installed packages for pydantic plugins."""


def make_ready() -> None:
    """Before the heavy libraries: what they tell developers (deprecations, missing kernels) is no
    news to a user."""
    import logging
    import warnings

    gc.enable()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # DeepSpeed sets a level of its own when it is imported.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
