"""What an analysis writes about a run, and when it may go on with what it finds."""

import hashlib
from pathlib import Path
from typing import Any

from torch import nn

from metaperturb.errors import UserError
from metaperturb.storage import load_json
from metaperturb.trained import TrainedRun


def begun(
    path: Path, run: TrainedRun, analysis: str, settings: dict[str, Any], parts: dict[str, Any]
) -> dict[str, Any]:
    """The results of an analysis in a JSON file; where there is no such file, what they begin with.

    Args:
        path: of the file; one that is damaged or holds something else is refused.
        run: whose network and images the results are about.
        analysis: its name.
        settings: all that changes its numbers, as JSON holds it (lists, no tuples). Equal ones, equal results.
        parts: what the results have besides, as it is at first.
    """
    about = {
        "analysis": analysis,
        "network": digest(run.model),
        "method": run.config.method,
        "finetuned": run.config.init is not None,
        "seed": run.config.seed,
        "model": run.config.model,
        "target": {"name": run.test.name, "fingerprint": run.test.fingerprint, "classes": run.test.num_classes},
        "settings": settings,
    }
    if not path.exists():
        return about | parts
    try:
        content = load_json(path)
    except UserError as error:
        raise UserError(f"{error}; remove it") from error
    if not isinstance(content, dict) or not {"analysis", *parts} <= content.keys():
        raise UserError(f"{path}: holds no results of an analysis; remove it")
    changed = [_change(key, content.get(key), value) for key, value in about.items() if content.get(key) != value]
    if changed:
        raise UserError(f"{path}: holds results of another kind ({'; '.join(changed)}); remove it")
    return content


def digest(model: nn.Module) -> str:
    """Identifies a network's weights and buffers: 12 hex digits."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        found.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:12]


def check_comparable(results: dict[str, list[dict[str, Any]]]) -> None:
    """Refuse results, name → of each run, that are not all about the same images by the same settings."""
    pairs = [(name, result) for name, of_runs in results.items() for result in of_runs]
    first_name, first = pairs[0]
    for name, result in pairs[1:]:
        for key in ("analysis", "target", "settings"):
            if result[key] != first[key]:
                raise UserError(f"{name} and {first_name} cannot be compared: {_change(key, first[key], result[key])}")


def _change(key: str, before: Any, after: Any) -> str:
    if isinstance(before, dict) and isinstance(after, dict):
        inner = [_change(f"{key}.{k}", before.get(k), v) for k, v in after.items() if before.get(k) != v]
        return "; ".join(inner) or f"{key} differs"
    return f"{key}: {before} → {after}"
