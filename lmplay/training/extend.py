"""Continue a finished run with a larger budget, instead of training it from the start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import LmplayError
from ..plan import Plan, parse_plan
from . import checkpoint
from .checkpoint import Checkpoint
from .curves import DIGESTS
from .optimizers import lr_multiplier
from .record import check_state
from .run_folder import RUN_FILE, RunFolder

BUDGETS = ("epochs", "tokens", "steps", "minutes")


@dataclass(frozen=True)
class Extended:
    """A finished run that a longer one continues."""

    run: RunFolder
    found: Checkpoint
    tokens: int

    def copy_to(self, folder: RunFolder) -> None:
        """Write its curves and its last checkpoint, at the same place in the longer plan."""
        for name in ("train.csv", "validate.csv", "samples.jsonl", DIGESTS):
            source = self.run.path / name
            if source.exists():
                (folder.path / name).write_bytes(source.read_bytes())
        place = self.found.state["place"]
        place = {
            **place,
            "plan_step": 0,
            "index": place["step"],
            "step_seconds": place["seconds"],
        }
        tensors = {name: self.found.tensors(name) for name in ("model", "optimizer", "rng")}
        state = {**self.found.state, "place": place}
        checkpoint.save(folder.checkpoints, self.found.step, tensors, state)

    def schedule(self, plan: Plan, share: float) -> str:
        """Return what happens to the learning rate, given the share of the budget that is done."""
        stage = plan.steps[0]
        schedule = plan.schedule_of(stage)
        before = lr_multiplier(schedule, 1.0)
        after = lr_multiplier(schedule, share)
        return (
            f"extending {self.run.path} from {self.tokens} tokens: the schedule {schedule.name} is "
            f"that of the longer run, so the learning rate goes from {before:.2f} to {after:.2f} "
            "of the plan's here, and to its end from there"
        )


def find_shorter(
    folder: RunFolder, identity: dict[str, Any], plan: Plan, say: Callable[[str], None]
) -> Extended:
    """Return the longest finished run next to `folder` that differs in nothing but its budget.

    Args:
        identity: of the longer run.
        plan: the longer run's, with its budget.

    Raises:
        LmplayError: there is none, or the plan has several steps.
    """
    if len(plan.steps) > 1:
        raise LmplayError("--extend continues plans of one step only")
    wanted = _without_budget(plan)
    best: Extended | None = None
    for path in sorted(folder.path.parent.glob(f"*/{RUN_FILE}")):
        run = RunFolder(path.parent)
        if run.path == folder.path:
            continue
        try:
            record = run.read()
            known = record["identity"]
            same = all(known.get(k) == v for k, v in identity.items() if k not in OWN)
            if not same or not record.get("summary") or "extends" in known:
                continue
            if _without_budget(parse_plan(record.get("plan"), str(path))) != wanted:
                continue
            found = run.newest(say, check_state)
        except LmplayError as e:
            say(f"{run.path}: left out: {e}")
            continue
        if found is not None and (best is None or found.step > best.found.step):
            best = Extended(run, found, int(found.state["place"]["tokens"]))
    if best is None:
        raise LmplayError(
            f"--extend: {folder.path.parent} has no finished run that differs from this one in "
            "nothing but its budget"
        )
    return best


OWN = ("plan", "extends")  # parts of an identity in which the longer run differs


def _without_budget(plan: Plan) -> dict[str, Any]:
    content = plan.model_dump(mode="json", exclude={"description"})
    content["datasets"] = {name: source.identity() for name, source in plan.datasets.items()}
    content["tokenizer"] = plan.tokenizer.identity()
    for stage in content["steps"]:
        for budget in BUDGETS:
            stage.pop(budget)
    return content
