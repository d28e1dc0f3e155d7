"""Certificates: what an arena can resolve, as `lmp_arena` measured it.

The certificate of training_plans/NAME.json is training_plans/certificates/NAME.json. It has an
entry for each precision, because a plan may have another budget in float32. An entry holds for the
plan that it was measured on: with another it is stale.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from ..errors import LmplayError
from ..files import read_json, write_json
from ..plan import Plan, load_plan, plan_files

FOLDER = "certificates"
LINES = (
    "beyond counting",
    "tuned",
    "scale",
    "sensitivity",
    "planted effects",
    "known answers",
    "transfer",
)
"""In the order in which they are shown."""

Finite = Annotated[float, Field(allow_inf_nan=False)]


class LineRecord(BaseModel, extra="allow"):
    """A line. passed: None if it was not measured."""

    passed: bool | None
    sentence: str


class Certificate(BaseModel):
    """What was measured in one precision.

    plan: fingerprint of the plan with its contexts. arena: that of what runs must share to be
    compared. date: ISO. machine: processor and cores.
    minutes_per_run: of training, of one run of the baseline. smallest_gain: nats per token that
    nine pairs detect if the idea is like its baseline; smallest_gain_unlike: if it differs from it
    as much as the known answers do.
    """

    plan: str
    arena: str
    baseline: str
    baseline_source: str
    date: str
    machine: str
    device: str
    precision: str
    tokens: int
    minutes_per_run: Finite | None = None
    smallest_gain: Finite | None = None
    smallest_gain_unlike: Finite | None = None
    deviation_paired: Finite | None = None
    lines: dict[str, LineRecord]

    def failed(self) -> list[str]:
        """Return the names of the lines that did not pass."""
        return [name for name in LINES if name in self.lines and self.lines[name].passed is False]

    def missing(self) -> list[str]:
        """Return the names of the lines that were not measured."""
        return [n for n in LINES if n not in self.lines or self.lines[n].passed is None]

    def sentence(self) -> str:
        """Return it in one line: "certified" if all lines but transfer passed, else "measured"."""
        passed = not self.failed() and set(self.missing()) <= {"transfer"}
        parts = [f"{'certified' if passed else 'measured'} {self.date} in {self.precision}"]
        counting = self.lines.get("beyond counting")
        if counting is not None and counting.passed is not None:
            parts.append("beyond counting" if counting.passed else "NOT beyond counting")
        if self.smallest_gain is not None:
            unlike = self.smallest_gain_unlike
            parts.append(
                f"nine pairs detect {self.smallest_gain:.4f} nats between like models"
                + (f", {unlike:.3f} between unlike ones" if unlike is not None else "")
            )
        if failed := self.failed():
            parts.append(f"fails: {', '.join(failed)}")
        if missing := self.missing():
            parts.append(f"not measured: {', '.join(missing)}")
        return "arena " + "; ".join(parts)


def certificate_file(plan: Path) -> Path:
    """Return where a plan's certificate is kept."""
    return plan.parent / FOLDER / plan.name


def plan_print(plan: Plan) -> str:
    """Return 16 hex digits that change with everything that makes a certificate stale."""
    text = json.dumps([plan.content(), plan.contexts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_certificates(plan: Path) -> dict[str, Certificate]:
    """Return a plan's certificates by precision; {} if there are none.

    Raises:
        LmplayError: the file is damaged.
    """
    path = certificate_file(plan)
    try:
        content = read_json(path)
        return {name: Certificate.model_validate(entry) for name, entry in content.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, ValidationError, AttributeError) as e:
        first = str(e).split("\n", 1)[0]
        raise LmplayError(
            f"{path}: this certificate is damaged: {first}; lmp_arena makes it anew"
        ) from e


def write_certificate(plan: Path, certificate: Certificate) -> Path:
    """Write a plan's certificate next to those of other precisions; return the file."""
    try:
        known: Mapping[str, Any] = read_json(certificate_file(plan))
    except (OSError, ValueError):  # none yet, or a damaged one, which this replaces
        known = {}
    content = {k: v for k, v in known.items() if isinstance(v, dict)}
    content[certificate.precision] = certificate.model_dump(mode="json")
    path = certificate_file(plan)
    write_json(path, content)
    return path


def of_runs(plan_name: str, arena: str, precision: str) -> Certificate | None:
    """Return the certificate that holds for runs in an arena; None if there is none.

    Args:
        plan_name: the name in their run.json, of a plan that may be gone.
        arena: the fingerprint in their run.json.
    """
    path = plan_files().get(plan_name)
    try:
        found = read_certificates(path).get(precision) if path else None
    except LmplayError:  # the figure is drawn without it; lmp_trainer --training-plan list says why
        return None
    return found if found is not None and found.arena == arena else None


def valid(
    path: Path, plan: Plan, precision: str, device: str = "cpu"
) -> tuple[Certificate | None, str]:
    """Return the certificate that holds for a plan, and one line to quote.

    Args:
        path: the plan's file.
        plan: with the budget of this machine, or the one that the user gave.
        precision: fp32, bf16 or fp16.
    """
    try:
        found = read_certificates(path).get(precision)
    except LmplayError as e:
        return None, f"uncertified arena: {e}"
    if found is None:
        return None, f"uncertified arena: lmp_arena {path.stem} measures what it can resolve"
    if found.plan != plan_print(plan.for_precision(device, precision)):
        edited = found.plan != plan_print(load_plan(path).for_precision(device, precision))
        why = "the plan was edited since" if edited else "it holds for the plan's own budget"
        return None, f"uncertified arena: its certificate of {found.date} is stale: {why}"
    if found.device != device:
        return None, f"uncertified arena: its certificate is of {found.device}"
    return found, found.sentence()
