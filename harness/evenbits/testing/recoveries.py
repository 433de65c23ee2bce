"""The contract of recovery stages: what they add is what they predict, what may not be trained is not, and the same
seed gives the same files. Tried on a tiny model of rounded rows, and on the dense one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evenbits.compressor import Recovery, RecoveryStage, Role, TunableModel
from evenbits.errors import EvenbitsError
from evenbits.testing.compressors import told, without_gpu
from evenbits.testing.contract import Check, Devices, NotApplicable, scratch_folder
from evenbits.testing.settings import check_descriptor, check_options, settled

if TYPE_CHECKING:
    import torch

    from evenbits.compressor import ModelShapes
    from evenbits.testing.before import Recovered, Workbench

SAMPLES, LENGTH = 8, 32  # of the calibration tokens that a stage trains on


@dataclass
class Watching:
    """A stage, and whether it moved the global random state."""

    stage: RecoveryStage
    moved: list[bool] = field(default_factory=list)

    def recover(self, work: TunableModel, generator: torch.Generator) -> None:
        from evenbits.testing.cases import random_state

        before = random_state()
        self.stage.recover(work, generator)
        self.moved.append(random_state() != before)


class RecoveryContract:
    def __init__(
        self,
        descriptor: Recovery,
        given: Mapping[str, Any] | None = None,
        model: Path | None = None,
        device: Devices = "auto",
    ) -> None:
        self.descriptor, self.model, self.device = descriptor, model, device
        self.options = settled(descriptor, given)
        self._runs: dict[str, Recovered | Exception | SystemExit] = {}

    def checks(self) -> list[Check]:
        listed: list[tuple[str, str, Callable[[], None]]] = [
            ("descriptor", "name and summary are fit to be shown and stored", self._descriptor),
            ("options", "frozen, described, unknown keys refused, the same from JSON", self._options),
            ("recover", "trains a compressed model and stores it", self._recover),
            ("predict", "predict names the bytes that are added, role by role", self._predict),
            ("untouched", "what may not be trained stays, bit for bit", self._untouched),
            ("determinism", "one seed gives the same files, whatever the global state", self._determinism),
            ("global-state", "the global random state stays as it was", self._global_state),
            ("files", "the dense model and the artifact before stay as they were", self._files),
            ("round-trip", "what is stored opens as a model that computes", self._round_trip),
            ("dense", "on the dense model too, or refused with a reason", self._dense),
            ("cuda", "trains on a GPU", self._cuda),
        ]
        return [Check(*each) for each in listed]

    # -- what it gave -----------------------------------------------------------------------------------------

    @cached_property
    def bench(self) -> Workbench:
        from evenbits.testing.before import Workbench

        return Workbench(scratch_folder(self), self.model, SAMPLES, LENGTH)

    def _run(self, name: str, which: str, outer: int = 0, device: str = "cpu") -> Recovered:
        """Of a fresh stage; the same name gives the same run. Raises what the stage raised."""
        if name not in self._runs:
            stage = Watching(self.descriptor.make(self.options))
            try:
                self._runs[name] = self.bench.recover(self.descriptor, self.options, stage, name, which, outer, device)
            except (Exception, SystemExit) as error:
                self._runs[name] = error
        found = self._runs[name]
        if isinstance(found, BaseException):
            raise found
        return found

    def _good(self) -> Recovered:
        try:
            return self._run("first", "compressed")
        except (Exception, SystemExit):
            raise NotApplicable("the stage ends in an error: see the check recover") from None

    # -- checks -----------------------------------------------------------------------------------------------

    def _descriptor(self) -> None:
        check_descriptor(self.descriptor)

    def _options(self) -> None:
        check_options(self.descriptor, self.options)

    def _recover(self) -> None:
        try:
            self._run("first", "compressed")
        except Exception as error:
            raise AssertionError(
                f"{self.descriptor.name}: fails on a tiny compressed model ({told(error)}): a stage may train "
                "`work.parameters`, `work.rest()` and adapters, and leave the rest; options={...} for shorter training"
            ) from error

    def _predict(self) -> None:
        self._bytes_of(self._good())

    def _bytes_of(self, run: Recovered) -> None:
        shapes: ModelShapes = self.bench.shapes
        name = self.descriptor.name
        dense = set(self.descriptor.dense(self.options, shapes))
        unknown = dense - {layer.name for layer in shapes.layers}
        assert not unknown, f"{name}: dense names {min(unknown, default='')!r}, which is no linear layer of the model"
        found = run.dense - run.dense_before
        assert found == dense - run.dense_before, (
            f"{name}: stores {len(found)} layers dense, `dense` names {len(dense)}: return the layers whose adapters "
            "are merged"
        )
        expected = dict(run.before_roles(without=dense))
        for role, count in self.descriptor.predict(self.options, shapes).items():
            assert isinstance(role, Role), f"{name}: predict must give bytes by Role, not by {role!r}"
            expected[role] = expected.get(role, 0) + count
        expected = {role: count for role, count in expected.items() if count}
        assert run.roles == expected, (
            f"{name}: predict and what was stored before make {_shown(expected)} bytes, stored are "
            f"{_shown(run.roles)}: `predict` must name all bytes that are added, at the dtype they are stored in"
        )

    def _untouched(self) -> None:
        self._left_alone(self._good())

    def _left_alone(self, run: Recovered) -> None:
        dense = set(self.descriptor.dense(self.options, self.bench.shapes))
        changed = run.changed_codes(without=dense)
        assert not changed, (
            f"{self.descriptor.name}: changed {changed[0]} ({len(changed)} tensors), which is not tunable: train what "
            "is in `work.parameters` as it was handed over, in place, and put nothing else there"
        )
        odd = run.changed_rest_forms()
        assert not odd, f"{self.descriptor.name}: {odd[0]} has another shape or dtype than before: keep both"

    def _determinism(self) -> None:
        first = self._good()
        again = self._run("again", "compressed", outer=12345)
        differ = [file for file in first.files if first.files[file] != again.files.get(file)]
        assert first.files == again.files, (
            f"{self.descriptor.name}: one seed stores another {', '.join(differ) or 'set of files'} the second time: "
            "draw from the `generator` argument only"
        )

    def _global_state(self) -> None:
        assert not self._good().moved_randomness, (
            f"{self.descriptor.name}: changed the global random state: draw from the `generator` argument, or wrap "
            "what draws from it in evenbits.models.guarded_randomness"
        )

    def _files(self) -> None:
        touched = self._good().touched
        assert not touched, f"{self.descriptor.name}: changed {touched[0]}: a stage writes through its `work` alone"

    def _round_trip(self) -> None:
        self._good().check_opens(self.descriptor.name)

    def _dense(self) -> None:
        try:
            run = self._run("dense", "dense")
        except EvenbitsError as error:
            raise NotApplicable(f"refuses the dense model: {' '.join(str(error).split())}") from None
        except Exception as error:
            raise AssertionError(
                f"{self.descriptor.name}: fails on the dense model ({told(error)}): it has no tunable tensors; refuse "
                "it by TrialFailed with a reason where the stage can do nothing there"
            ) from error
        self._bytes_of(run)
        self._left_alone(run)

    def _cuda(self) -> None:
        without_gpu(self.device)
        self._good()
        try:
            run = self._run("cuda", "compressed", device="cuda")
        except Exception as error:
            raise AssertionError(
                f"{self.descriptor.name}: fails on a GPU ({told(error)}): put what it makes on the device of the model"
            ) from error
        self._left_alone(run)


def _shown(roles: Mapping[Role, int]) -> str:
    return " + ".join(f"{count} {role.value}" for role, count in sorted(roles.items())) or "0"
