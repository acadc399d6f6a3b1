"""Analyses take finished runs (`metaperturb.trained`) and know nothing of training: the paper's figures as numbers."""

import hashlib
from pathlib import Path
from typing import Any

from metaperturb.errors import UserError
from metaperturb.storage import load_json
from metaperturb.trained import TrainedRun


def begun(
    path: Path, run: TrainedRun, analysis: str, settings: dict[str, Any], parts: dict[str, Any]
) -> dict[str, Any]:
    """The results of an analysis of a run in a JSON file; where there is no such file, what they begin with.

    Args:
        path: of the file; one that is damaged or holds something else is refused.
        settings: all that changes its numbers, as JSON holds it (lists, no tuples). Equal ones, equal results.
        parts: what the results have besides, as it is at first.
    """
    weights = [name.encode() + value.cpu().numpy().tobytes() for name, value in sorted(run.model.state_dict().items())]
    about = {
        "analysis": analysis,
        "network": hashlib.sha256(b"".join(weights)).hexdigest()[:12],
        "method": run.config.method,
        "finetuned": run.config.init is not None,
        "seed": run.config.seed,
        "model": run.config.model,
        "target": {"name": run.test.name, "fingerprint": run.test.fingerprint, "classes": run.test.num_classes},
        "settings": settings,
    }
    if not path.exists():
        return about | parts
    content = load_json(path)
    known = content if isinstance(content, dict) else {}
    if changed := [key for key in (*about, *parts) if key not in known or known[key] != about.get(key, known[key])]:
        raise UserError(f"{path}: holds results of something else ({', '.join(changed)} differ); remove it")
    return content
