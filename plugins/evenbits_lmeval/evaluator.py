"""Scores tasks with lm-eval's own prompts, metrics and groups, and keeps what every choice of every item scored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from evenbits.errors import MissingExtra, SuiteError, TrialFailed
from evenbits.measure import Measurement, Remark, Subject
from evenbits.sampling import tokenizer_identity
from evenbits_lmeval.loading import Loaded, loaded_tasks
from evenbits_lmeval.metrics import (
    Column,
    Part,
    Whole,
    choice_scores,
    columns,
    joint_protocol,
    mean_of,
    measured,
    without_items,
)
from evenbits_lmeval.options import ADD_BOS, ERAS, FEW_SHOT_SEED, LmEvalOptions
from evenbits_lmeval.scoring import Items, build, score
from evenbits_lmeval.sets import BLIMP, PARADIGMS


@dataclass(frozen=True)
class Run:
    """What a scored run knows beside its items.

    fronts: by task, what stands in front of its first request. scored_by: by task, the scorer's path, reason and
    batches. softmax: the dtype in which logits were normalised.
    """

    facts: Mapping[str, Any]
    fronts: Mapping[str, str | None]
    scored_by: Mapping[str, Mapping[str, Any]]
    max_length: int
    softmax: str

    def scored(self, tasks: Iterable[str]) -> Mapping[str, Any]:
        """Of a figure over tasks: lm-eval's own way where it scored any of them."""
        found = [self.scored_by[task] for task in tasks]
        return next((each for each in found if each["scorer_reason"] is not None), found[0])


@dataclass(frozen=True)
class TaskResult:
    """Of one task. parts: by metric, for means. cut: what was truncated. files: to be kept beside the record."""

    measurements: Sequence[Measurement]
    parts: Mapping[str, Part]
    cut: Mapping[str, int]
    files: Mapping[str, bytes]


class LmEvalEvaluator:
    def __init__(self, options: LmEvalOptions) -> None:
        self.options = options

    def evaluate(self, subject: Subject) -> Sequence[Measurement | Remark]:
        """First the means that the options name, then for each name asked for its groups' and its tasks' metrics.

        A task's are called "TASK_METRIC" ("piqa_acc"); their items stand in the task's order. Of a group, what lm-eval
        states for it: the mean over its tasks (of subgroups too), each counting alike, or by its items where the group
        says so; a group or tag without such a statement has only its tasks' metrics. Accuracies are shares of 1, higher
        is better. low, high: 95 % over items, Wilson's of right or wrong answers, else the bootstrap's, for means
        within each task. A metric that is no statistic of single items (F1, correlations) has neither.
        A group's tasks are metrics of their own with the option `members`, else in the details of its figure ("tasks").
        The first measurement of a task, or of its group, holds the attachment choices-TASK.npz (see `ChoiceScores`).
        details: items; the scorer's path, its reason where lm-eval's own way was taken, its batches; truncated_items
        and truncated_requests, which lost tokens on the left for want of context, and which a remark names, too.
        Raises SuiteError for unknown tasks, broken items and a mean of what has no accuracy, all before anything is
        scored; TrialFailed for data that cannot be loaded and a task without metric; MissingExtra without lm-eval.
        """
        try:
            import lm_eval  # noqa: F401
        except ImportError as error:
            raise MissingExtra("lm-eval", "lmeval") from error
        with loaded_tasks(self.options) as loaded:
            self._check_means(loaded)
            built = [build(name, task, self.options) for name, task in loaded.tasks.items()]
            run = self._answer(subject, built)
            return [*self._measurements(loaded, built, run), *self._remarks(loaded, built, run)]

    def _check_means(self, loaded: Loaded) -> None:
        for name in (self.options.mean, self.options.mean_norm):
            for task, which in loaded.tasks.items():
                filters = which.get_config("filter_list") or ()
                several = "several, by filters" if len(filters) > 1 else None
                lacks = several if "acc" in which.aggregation() else "none"
                if name is not None and lacks is not None:
                    raise SuiteError(
                        f"lm-eval: {name!r} is a mean of accuracies, and {task} has {lacks}; leave it out, "
                        "or measure it by an evaluator of its own"
                    )

    def _answer(self, subject: Subject, built: Sequence[Items]) -> Run:
        from evenbits_lmeval.scorer import make_scorer

        advance = subject.progress(sum(len(list(items.flat)) for items in built), "lm-eval")
        lm = make_scorer(
            subject.model,
            subject.tokenizer,
            device=subject.device,
            encoding=ERAS[self.options.era].encoding,
            add_bos=ADD_BOS[self.options.bos_rule],
            max_length=self.options.max_length,
            batch_tokens=self.options.batch_tokens,
            batch_size=self.options.batch_size,
            kind=self.options.scorer,
            progress=advance,
        )
        fronts = {items.name: self._front(lm, items) for items in built}
        scored_by: dict[str, Mapping[str, Any]] = {}
        # where the softmax is alike the two ways to score agree within 1e-4 nats (float32), so which one it was is no
        # part of the protocol: a trial on a model that only lm-eval's own can score still stands in one column with
        # the others
        for items in built:
            score(lm, items, advance)
            scored_by[items.name] = {"scorer": lm.path, "scorer_reason": lm.reason, "batches": dict(lm.policy)}
        facts = {**subject.facts, "tokenizer": tokenizer_identity(subject.tokenizer)}
        softmax = str(lm.model.dtype).removeprefix("torch.") if lm.softmax_dtype is None else "float32"
        return Run(facts, fronts, scored_by, int(lm.max_length), softmax)

    def _front(self, lm: Any, items: Items) -> str | None:
        """The tokens that stand in front of the task's first request without being of its text; None: there are none.

        Raises TrialFailed where BOS was asked for and the tokenizer puts none.
        """
        text = "" if items.kind == "loglikelihood_rolling" else items.requests[0][0].args[0].rstrip()
        if text == "":  # nothing is scored without a context: one token stands for it, whatever the BOS rule
            return str(lm.tokenizer.convert_ids_to_tokens(lm.prefix_token_id))
        whole, own = lm.tok_encode(text), lm.tok_encode(text, add_special_tokens=False)
        before = next((n for n in range(len(whole)) if whole[n : n + len(own)] == own), 0)
        if not before and self.options.bos == "always":
            raise TrialFailed(
                'lm-eval: bos = "always", but this tokenizer puts no BOS in front of a text; '
                'give bos = "none", or a tokenizer whose template has one'
            )
        return " ".join(lm.tokenizer.convert_ids_to_tokens(whole[:before])) or None

    def _protocol(self, items: Items, run: Run) -> dict[str, Any]:
        options = self.options
        few_shot = int(items.task.get_config("num_fewshot") or 0)
        return {
            **run.facts,
            "task": items.name,
            "task_version": str(items.task.VERSION),
            "items": len(items.docs),
            "items_sha256": items.identity[:16],
            "few_shot": few_shot,
            "few_shot_seed": FEW_SHOT_SEED if few_shot else None,
            "era": options.era,
            "encoding": ERAS[options.era].encoding,
            "bos": options.bos_rule,
            "front": run.fronts[items.name],
            "max_length": run.max_length,
            "softmax": run.softmax,
            "lm_eval": version("lm-eval"),
        }

    def _remarks(self, loaded: Loaded, built: Sequence[Items], run: Run) -> list[Remark]:
        remarks = []
        if BLIMP in loaded.groups and (paradigms := len(loaded.groups[BLIMP].tasks)) < PARADIGMS:
            remarks.append(Remark(f"blimp_acc is over {paradigms} of BLiMP's {PARADIGMS} paradigms"))
        slow = [name for name, each in run.scored_by.items() if each["scorer_reason"] is not None]
        if self.options.scorer == "auto" and slow:
            which = "" if len(slow) == len(built) else f" ({', '.join(slow)})"
            remarks.append(Remark(f"scored by lm-eval's own HFLM{which}: {run.scored(slow)['scorer_reason']}"))
        cut = {items.name: truncated(items)[0] for items in built}
        if any(cut.values()):
            said = ", ".join(f"{count} of {name}" for name, count in cut.items() if count)
            remarks.append(Remark(f"items longer than the context, cut on the left: {said}"))
        return remarks

    def _measurements(self, loaded: Loaded, built: Sequence[Items], run: Run) -> list[Measurement]:
        tasks = {items.name: self._task(items, run) for items in built}
        result: list[Measurement] = []
        listed: list[Mapping[str, Part]] = []
        for name, members in loaded.listed.items():
            figures, joint = self._groups(loaded, name, [tasks[member] for member in members], run)
            result += figures
            listed += [joint] if joint else [tasks[member].parts for member in members]
            if not joint or self.options.members:
                for member in members:
                    result += tasks[member].measurements
        return [*self._means(listed, run), *result]  # what papers compare comes first

    def _task(self, items: Items, run: Run) -> TaskResult:
        protocol = self._protocol(items, run)
        found, others = columns(items)
        cut, files = {}, {}
        if (scores := choice_scores(items, items.hashes)) is not None:
            files[f"choices-{_file_name(items.name)}.npz"] = scores.to_bytes()
            cut = dict(zip(("truncated_items", "truncated_requests"), truncated(items), strict=True))
        details = {**run.scored_by[items.name], **cut}
        measurements: list[Measurement] = []
        every: list[tuple[str, Column | Whole]] = [*found.items(), *others.items()]
        for metric, each in every:
            name = f"{items.name}_{metric}"
            fields = {**protocol, "scoring": each.scoring, "metric": metric}
            kept = {} if measurements else files
            if isinstance(each, Column):
                measurements.append(measured(name, each, fields, details, kept))
            else:
                measurements.append(without_items(name, each, fields, details, kept))
        parts = {
            metric: Part(items.name, column, (len(column.items),), {**protocol, "scoring": column.scoring})
            for metric, column in found.items()
        }
        return TaskResult(measurements, parts, cut, files)

    def _groups(
        self, loaded: Loaded, name: str, members: Sequence[TaskResult], run: Run
    ) -> tuple[list[Measurement], dict[str, Part]]:
        """The figures of the groups below `name`, and its own as parts of a mean: {} where none is stated for `acc`."""
        parts = {part.name: member.parts for member in members for part in member.parts.values()}
        files = {file: data for member in members for file, data in member.files.items()}
        cut = {key: sum(member.cut[key] for member in members if member.cut) for key in members[0].cut}
        figures: list[Measurement] = []
        joint: dict[str, Part] = {}
        for group in loaded.groups.values():
            if not set(group.tasks) <= set(parts):
                continue
            for each in group.metrics:
                over = [parts[task][each.metric] for task in group.tasks if each.metric in parts[task]]
                if not over or over[0].column.statistic != "mean":
                    continue
                column, strata = mean_of(over, each.metric, each.by_items)
                fields = joint_protocol(over, each.metric)
                fields["mean"] = "of all items" if each.by_items else "of the tasks' means"
                own = group.name == name
                details = {
                    **run.scored(part.name for part in over),
                    **(cut if own else {}),
                    "tasks": {part.name: part.column.value for part in over},
                }
                kept = files if own and not joint and not self.options.members else {}
                figures.append(measured(f"{group.name}_{each.metric}", column, fields, details, kept, strata))
                if own:
                    joint[each.metric] = Part(group.name, column, strata, fields)
        return figures, joint if "acc" in joint else {}

    def _means(self, listed: Sequence[Mapping[str, Part]], run: Run) -> list[Measurement]:
        """Plain means over what was asked for, as papers print them."""
        wanted: list[tuple[str, str, list[Part]]] = []
        if self.options.mean is not None:
            wanted.append((self.options.mean, "mean of acc", [each["acc"] for each in listed]))
        if self.options.mean_norm is not None:
            metric = "mean of acc_norm, of acc where there is none"
            chosen = [each.get("acc_norm", each["acc"]) for each in listed]
            wanted.append((self.options.mean_norm, metric, chosen))
        found = []
        for name, metric, over in wanted:
            column, strata = mean_of(over, "acc")
            tasks = {part.name: part.column.value for part in over}
            details = {**run.scored(run.scored_by), "tasks": tasks}
            found.append(measured(name, column, joint_protocol(over, metric), details, strata=strata))
        return found


def truncated(items: Items) -> tuple[int, int]:
    """How many items, and how many of their requests, lost tokens on the left."""
    cut = [sum(size.cut > 0 for size in sizes) for sizes in items.lengths]
    return sum(count > 0 for count in cut), sum(cut)


def _file_name(task: str) -> str:
    """Letters, digits, dots, dashes: what may stand in the name of a file beside a record."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in task)
