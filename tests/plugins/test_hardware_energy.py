"""Energy per token: with meters that count a scripted cost of each token, the figures come back exactly."""

from __future__ import annotations

import os
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from evenbits.environment import package_version
from evenbits.errors import SuiteError, TrialFailed
from evenbits.measure import Finding, Measurement, Remark, Weights, fingerprint_id
from evenbits.packed import LayerKernels, attach_kernels
from evenbits.suite import check_options
from evenbits_hardware import energy, estimate, meters, profiler, provide_profilers, rapl
from evenbits_hardware.absent import NoMeter
from evenbits_hardware.energy import Stretch, blind, meter_rest, meter_stretch, per_token
from evenbits_hardware.estimate import Codecarbon
from evenbits_hardware.meters import CounterMeter, PowerMeter, open_meter
from evenbits_hardware.nvml import Board, BoardPeak
from evenbits_hardware.options import EnergyOptions, HardwareOptions

PREFILL_JOULES, DECODE_JOULES = 0.25, 0.5  # of one token, as the scripted meters count them
QUICK: dict[str, Any] = {"prompt_tokens": 12, "decode_tokens": 5, "warmup": 1, "seconds": 0.02, "updates": 3}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
UUID = "3f2a"


class Ledger:
    """Joules that the model's work has cost so far."""

    joules = 0.0
    prefill, decode = PREFILL_JOULES, DECODE_JOULES
    spent: Callable[[float], None] | None = None

    def charge(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        batch, tokens = kwargs["input_ids"].shape
        cost = batch * (tokens * self.prefill if tokens > 1 else self.decode)
        self.joules += cost
        if self.spent is not None:
            self.spent(cost)


@dataclass
class LlamaSubject:
    """A random Llama whose forward passes are charged to a ledger."""

    ledger: Ledger
    device: torch.device = CPU
    seed: int = 3
    compress_peak_bytes: int | None = None
    compress_device_peak_bytes: int | None = None
    compress_seconds: float | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(
        default_factory=lambda: {"model": "tiny", "dtype": "float32", "attention": "sdpa", "kernel": "dense-restored"}
    )
    ticks: int = 0

    def load(self, weights: Weights = "restored") -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
        model = LlamaForCausalLM(config)
        model.register_forward_pre_hook(self.ledger.charge, with_kwargs=True)
        return model, None

    def progress(self, total: int, what: str) -> Callable[[int], None]:
        def tick(steps: int) -> None:
            self.ticks += steps

        return tick


def profile(ledger: Ledger, **options: Any) -> Sequence[Finding]:
    (made,) = (p for p in provide_profilers() if p.name == "energy")
    found: Sequence[Finding] = made.make(EnergyOptions(**{**QUICK, **options})).profile(LlamaSubject(ledger))
    return found


def measured(ledger: Ledger, **options: Any) -> dict[str, Measurement]:
    return {m.name: m for m in profile(ledger, **options) if isinstance(m, Measurement)}


# -- RAPL ----------------------------------------------------------------------------------------------------


def zone(root: Path, folder: str, name: str, energy_uj: int | str = "not a number", wraps: int = 0) -> Path:
    """One powercap zone; only a package's counter holds a number, so that reading any other fails."""
    made = root / folder
    made.mkdir(parents=True)
    (made / "name").write_text(f"{name}\n")
    (made / "energy_uj").write_text(f"{energy_uj}\n")
    (made / "max_energy_range_uj").write_text(f"{wraps}\n")
    return made / "energy_uj"


@pytest.fixture
def powercap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(rapl, "POWERCAP", tmp_path)
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    return tmp_path


@pytest.fixture
def two_packages(powercap: Path) -> Ledger:
    """Two packages that share the cost, 10 J from one wrap to the next, beside zones that count the same again."""
    wraps = 10_000_000
    counters = [zone(powercap, f"intel-rapl:{n}", f"package-{n}", wraps - 1_000_000, wraps) for n in (0, 1)]
    zone(powercap, "intel-rapl:0:0", "core")
    zone(powercap, "intel-rapl:2", "psys")
    zone(powercap, "intel-rapl-mmio:0", "package-0")
    ledger = Ledger()

    def spend(joules: float) -> None:
        for counter in counters:
            counter.write_text(str((int(counter.read_text()) + round(joules * 1e6 / 2)) % wraps))

    ledger.spent = spend
    return ledger


@pytest.mark.parametrize("batch_size", [1, 3])
def test_rapl_counts_packages_once_and_over_its_wraps(two_packages: Ledger, batch_size: int) -> None:
    found = measured(two_packages, batch_size=batch_size)
    prefill, decode = found["energy_prefill_J_per_token"], found["energy_decode_J_per_token"]
    assert prefill.value == pytest.approx(PREFILL_JOULES, rel=1e-6)
    assert decode.value == pytest.approx(DECODE_JOULES, rel=1e-6)
    for m in (prefill, decode):
        assert (m.unit, m.better, m.volatile) == ("J/token", "lower", True)
        assert m.fingerprint["meter"] == {
            "name": "rapl",
            "kind": "counter",
            "scope": "processor packages: package-0, package-1",
        }
        assert {"kernel", "device", "device_name", "threads", "torch", "transformers", "attention", "dtype"} <= set(
            m.fingerprint
        )
        assert m.details["rest_watts"] is None  # the scripted counter stands still at rest: nothing is made up
        assert m.details["above_rest_J_per_token"] is None
        for name in ("prefill", "prefill_and_decode"):
            stretch = m.details["stretches"][name]
            assert stretch["seconds"] >= 0.02
            assert stretch["updates"] >= 3
            assert stretch["watts"] == pytest.approx(stretch["joules"] / stretch["seconds"])


@dataclass
class PackedSubject(LlamaSubject):
    """Its layers are said to be computed by a kernel, but for one."""

    def load(self, weights: Weights = "restored") -> tuple[nn.Module, Any]:
        model, tokenizer = super().load()
        return (model if weights == "restored" else attach_kernels(model, LayerKernels({}, {"a": "none"}))), tokenizer


def test_packed_weights_are_metered_under_their_own_protocol(two_packages: Ledger) -> None:
    (made,) = (p for p in provide_profilers() if p.name == "energy")
    either = {}
    for weights in ("restored", "packed"):
        options = EnergyOptions.model_validate({**QUICK, "weights": weights})
        either[weights] = made.make(options).profile(PackedSubject(two_packages))
    remarks = [one.text for one in either["packed"] if isinstance(one, Remark)]
    assert remarks == ["1 of 1 layers ran on dense weights: none (1 layer)"]
    assert not any(isinstance(one, Remark) for one in either["restored"])
    restored, packed = ([m for m in found if isinstance(m, Measurement)] for found in either.values())
    assert len(packed) == 2
    for one, other in zip(restored, packed, strict=True):
        assert other.fingerprint == {**one.fingerprint, "kernel": "packed", "numba": package_version("numba")}
        assert other.details["kernels"] == {"packed_layers": 0, "dense_layers": 1, "why_dense": {"none": 1}}
        assert "kernels" not in one.details


def test_a_counter_that_may_not_be_read_says_what_helps(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = zone(powercap, "intel-rapl:0", "package-0", 5, 10)
    read = Path.read_text

    def refuse(self: Path, *args: Any, **kwargs: Any) -> str:
        if self == counter:
            raise PermissionError(13, "Permission denied")
        return read(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(NoMeter, match=rf"may not be read by this user.*chmod a\+r {counter}"):
        open_meter("rapl", CPU)


@pytest.mark.parametrize("name", ["psys", "core"])
def test_a_tree_without_packages_is_no_meter(powercap: Path, name: str) -> None:
    zone(powercap, "intel-rapl:0", name)
    with pytest.raises(NoMeter, match="no processor package"):
        open_meter("rapl", CPU)


# -- no meter ------------------------------------------------------------------------------------------------


def test_without_a_meter_there_is_a_reason_and_no_figure(powercap: Path) -> None:
    (remark,) = profile(Ledger())
    assert isinstance(remark, Remark)
    assert "no energy was measured: rapl: " in remark.text
    assert 'codecarbon: codecarbon is not installed: pip install "evenbits[energy]"' in remark.text
    assert "\n" not in remark.text


@pytest.mark.parametrize(
    ("meter", "reason"),
    [("rapl", "no processor package"), ("nvml", "the model runs on cpu"), ("codecarbon", "is not installed")],
)
def test_a_meter_asked_for_by_name_must_be_there(powercap: Path, meter: str, reason: str) -> None:
    with pytest.raises(TrialFailed, match=f"energy: meter '{meter}' cannot be used here: .*{reason}"):
        profile(Ledger(), meter=meter)


def test_an_unknown_meter_is_refused_with_near_names() -> None:
    with pytest.raises(SuiteError, match=r"energy.meter: unknown meter 'rappl'; did you mean \"rapl\"\?"):
        check_options(EnergyOptions, {"meter": "rappl"}, "profiler energy")
    for meter in ("auto", *meters.OPENERS):
        assert EnergyOptions(meter=meter).meter == meter


def test_a_meter_that_stands_still_is_no_meter(two_packages: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "STALL_SECONDS", 0.05)
    two_packages.prefill = two_packages.decode = 0.0
    (remark,) = profile(two_packages)
    assert isinstance(remark, Remark)
    assert "did not change in 0.05 s" in remark.text
    with pytest.raises(TrialFailed, match="did not change"):
        profile(two_packages, meter="rapl")


def test_decoding_below_the_resolution_is_not_given(two_packages: Ledger) -> None:
    two_packages.decode = 0.0
    found = profile(two_packages)
    assert [m.name for m in found if isinstance(m, Measurement)] == ["energy_prefill_J_per_token"]
    assert next(m.text for m in found if isinstance(m, Remark)).startswith("decoding took less energy")


def test_a_batch_that_does_not_fit_the_gpu_is_a_remark(two_packages: Ledger) -> None:
    def refuse(joules: float) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    two_packages.spent = refuse
    (remark,) = profile(two_packages, batch_size=64)
    assert isinstance(remark, Remark)
    assert "too little GPU memory for batch size 64" in remark.text


# -- arithmetic ----------------------------------------------------------------------------------------------


def test_what_is_above_rest_is_subtracted_by_time() -> None:
    """10 W at rest; a prefill of 2 x 8 tokens takes 4 J in 0.1 s, the decoding of 2 x 5 after it 6 J in 0.2 s."""
    rest = Stretch(joules=20, seconds=2, repeats=100, updates=50, parts={})
    prefill = Stretch(joules=40, seconds=1, repeats=10, updates=10, parts={})
    both = Stretch(joules=40, seconds=1.2, repeats=4, updates=20, parts={})
    first, second = per_token((2, 8), 5, rest, prefill, both, {})
    assert isinstance(first, Measurement)
    assert isinstance(second, Measurement)
    assert first.value == pytest.approx(4 / 16)
    assert second.value == pytest.approx(6 / 10)
    assert first.details["above_rest_J_per_token"] == pytest.approx((4 - 1) / 16)
    assert second.details["above_rest_J_per_token"] == pytest.approx((6 - 2) / 10)
    assert first.details["rest_watts"] == 10
    assert (first.details["resolution"], second.details["resolution"]) == (0.1, 0.1)


def test_a_coarse_counter_loses_nothing_at_the_ends() -> None:
    """A counter renewed at every seventh repeat: between its first and last change lie whole periods."""
    true, shown, calls = 0.0, 0.0, 0

    def work() -> None:
        nonlocal true, shown, calls
        calls += 1
        true += 1.5
        if calls % 7 == 0:
            shown = true

    meter = CounterMeter("coarse", "", {}, [(lambda: shown, None)])
    stretch = meter_stretch(meter, work, 0.0, 4)
    assert stretch.joules / stretch.repeats == pytest.approx(1.5)
    assert (stretch.repeats, stretch.updates) == (28, 4)


def test_rest_is_metered(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = CounterMeter("steady", "", {}, [(lambda: 40 * time.perf_counter(), None)])
    rest = meter_rest(meter, 0.05)
    assert rest is not None
    assert rest.watts == pytest.approx(40, rel=0.1)
    assert meter_rest(CounterMeter("still", "", {}, [(lambda: 3.0, None)]), 0.02) is None


def test_a_counter_that_falls_without_a_wrap_is_not_trusted() -> None:
    readings = iter([5.0, 6.0, 2.0])
    meter = CounterMeter("nvml", "", {}, [(lambda: next(readings), None)])
    meter.begin()
    assert meter.look() == 1.0
    with pytest.raises(NoMeter, match="fell from 6 to 2 J"):
        meter.look()


def test_sampled_power_is_summed_by_trapezoids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "POWER_SECONDS", 1000)  # the thread stays out of it
    clock = iter([0.0, 1.0, 4.0])
    watts = iter([10.0, 20.0, 20.0])
    monkeypatch.setattr(meters, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    meter = PowerMeter("nvml-power", "", {}, lambda: next(watts))
    meter.begin()
    assert meter.look() == 15.0
    assert meter.end() == 75.0


def test_the_thread_samples_power(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "POWER_SECONDS", 0.001)
    looks = 0

    def watts() -> float:
        nonlocal looks
        looks += 1
        return 50.0

    stretch = meter_stretch(PowerMeter("nvml-power", "", {}, watts), lambda: time.sleep(0.05), 0.1, 1)
    assert looks > stretch.repeats + 2
    assert stretch.watts == pytest.approx(50, rel=0.2)


def test_a_broken_sensor_ends_the_stretch(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([50.0])

    def watts() -> float:
        try:
            return next(readings)
        except StopIteration:
            raise NoMeter("NVML: GPU is lost") from None

    with pytest.raises(NoMeter, match="GPU is lost"):
        meter_stretch(PowerMeter("nvml-power", "", {}, watts), lambda: None, 0.1, 1)


# -- codecarbon ----------------------------------------------------------------------------------------------


class FakeTracker:
    """The parts of codecarbon's OfflineEmissionsTracker that are used; it costs what the ledger says."""

    ledger = Ledger()
    given: Mapping[str, Any] = {}
    telemetry: str | None = None

    def __init__(
        self, *, country_iso_code: str, measure_power_secs: float, tracking_mode: str, log_level: str,
        save_to_file: bool, save_to_api: bool, save_to_logger: bool, save_to_prometheus: bool, save_to_logfire: bool,
        emissions_endpoint: bool, allow_multiple_runs: bool, pue: float,
    ) -> None:  # fmt: skip
        type(self).given = {name: value for name, value in locals().items() if name != "self"}
        type(self).telemetry = os.environ.get(estimate.TELEMETRY)

    def start_task(self) -> None:
        self._start = self.ledger.joules

    def stop_task(self) -> Any:
        kwh = (self.ledger.joules - self._start) / 3.6e6 + 1e-15  # never quite nothing
        return SimpleNamespace(energy_consumed=kwh, cpu_energy=0.75 * kwh, gpu_energy=0.0, ram_energy=0.25 * kwh)

    def stop(self) -> None:
        raise AssertionError("it would persist and send")


class NewerTracker(FakeTracker):
    level: str | None = None

    def __init__(
        self, *args: Any, output_methods: Sequence[str] = ("csv",), telemetry_level: str = "minimal", **kwargs: Any
    ) -> None:
        assert not any(name.startswith("save_") for name in kwargs)  # newer versions warn of these
        kwargs |= dict.fromkeys(estimate.OUTPUTS, bool(output_methods))
        super().__init__(*args, **kwargs)
        type(self).level = telemetry_level


@pytest.fixture
def codecarbon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    module = ModuleType("codecarbon")
    module.OfflineEmissionsTracker = FakeTracker  # type: ignore[attr-defined]
    FakeTracker.ledger = Ledger()
    monkeypatch.setitem(sys.modules, "codecarbon", module)
    monkeypatch.setattr(rapl, "POWERCAP", tmp_path)
    monkeypatch.setattr(Codecarbon, "period", 0.005)
    return module


def test_the_estimate_is_the_last_resort_and_says_so(codecarbon: ModuleType) -> None:
    found = measured(FakeTracker.ledger)
    prefill, decode = found["energy_prefill_J_per_token"], found["energy_decode_J_per_token"]
    assert prefill.value == pytest.approx(PREFILL_JOULES, rel=1e-6)
    assert decode.value == pytest.approx(DECODE_JOULES, rel=1e-6)
    meter = decode.fingerprint["meter"]
    assert (meter["name"], meter["kind"]) == ("codecarbon", "estimate")
    stretch = decode.details["stretches"]["prefill_and_decode"]
    assert stretch["cpu_joules"] == pytest.approx(0.75 * stretch["joules"])


def test_the_estimate_stays_on_this_machine(codecarbon: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(estimate.TELEMETRY, "minimal")
    Codecarbon()
    assert not any(value for name, value in FakeTracker.given.items() if name.startswith("save_"))
    assert FakeTracker.given["emissions_endpoint"] is False
    assert FakeTracker.given["log_level"] == "error"
    assert FakeTracker.telemetry == "disabled"
    assert os.environ[estimate.TELEMETRY] == "minimal"
    monkeypatch.delenv(estimate.TELEMETRY)
    codecarbon.OfflineEmissionsTracker = NewerTracker  # type: ignore[attr-defined]
    Codecarbon()
    assert NewerTracker.level == "disabled"
    assert not any(value for name, value in NewerTracker.given.items() if name.startswith("save_"))
    assert estimate.TELEMETRY not in os.environ


def test_an_estimate_that_does_not_see_the_work_says_so(codecarbon: ModuleType) -> None:
    """On a machine whose load codecarbon cannot read, its joules are a constant power times the seconds."""
    rest = Stretch(joules=56, seconds=2, repeats=1, updates=2, parts={})
    work = Stretch(joules=85, seconds=3, repeats=10, updates=3, parts={})
    remark = blind(Codecarbon(), rest, work)
    assert remark is not None
    assert "28.3 W at work, 28.0 W at rest" in remark.text
    assert blind(Codecarbon(), rest, Stretch(joules=95, seconds=3, repeats=10, updates=3, parts={})) is None
    assert blind(CounterMeter("rapl", "", {}, []), rest, work) is None  # a counter's word is taken
    assert blind(Codecarbon(), None, work) is None


@pytest.mark.parametrize("gives", [None, SimpleNamespace(energy_consumed=0.0), AttributeError("_emissions")])
def test_an_estimate_that_fails_is_no_figure(
    codecarbon: ModuleType, monkeypatch: pytest.MonkeyPatch, gives: Any
) -> None:
    def stop_task(self: FakeTracker) -> Any:
        if isinstance(gives, Exception):
            raise gives
        return gives

    monkeypatch.setattr(FakeTracker, "stop_task", stop_task)
    (remark,) = profile(FakeTracker.ledger)
    assert isinstance(remark, Remark)
    assert "codecarbon gave no estimate" in remark.text


def test_meters_of_two_kinds_never_share_a_column(codecarbon: ModuleType, two_packages: Ledger) -> None:
    counted = measured(two_packages)["energy_decode_J_per_token"]
    sys.modules["codecarbon"] = codecarbon  # two_packages takes it away
    FakeTracker.ledger = Ledger()
    estimated = measured(FakeTracker.ledger, meter="codecarbon")["energy_decode_J_per_token"]
    assert fingerprint_id(counted.fingerprint) != fingerprint_id(estimated.fingerprint)
    differ = {key for key in counted.fingerprint if counted.fingerprint[key] != estimated.fingerprint[key]}
    assert differ == {"meter"}


# -- NVML ----------------------------------------------------------------------------------------------------


class NVMLError(Exception):
    pass


class FakeNvml(ModuleType):
    """Two boards; the second is the model's. Energy in mJ, power in mW, memory in bytes, as NVML gives them."""

    NVMLError = NVMLError

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.ledger = Ledger()
        self.refused: set[str] = set()
        self.processes: list[Any] = []
        self.used = 0

    def _refuse(self, what: str) -> None:
        if what in self.refused:
            raise NVMLError("Not Supported")

    def nvmlInit(self) -> None:
        self._refuse("init")

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> bytes | str:
        return b"GPU-0000" if handle == 0 else f"GPU-{UUID}"  # bytes in older versions

    def nvmlSystemGetDriverVersion(self) -> str:
        return "570.1"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        assert handle == 1
        self._refuse("energy")
        return round(self.ledger.joules * 1000)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        assert handle == 1
        self._refuse("power")
        return 60_000

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        assert handle == 1
        self._refuse("processes")
        return self.processes

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        assert handle == 1
        self._refuse("memory")
        return SimpleNamespace(used=self.used)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUID))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return fake


def test_nvml_counts_the_board_of_the_model(nvml: FakeNvml) -> None:
    meter = open_meter("auto", CUDA)
    assert (meter.name, meter.kind, meter.facts) == ("nvml", "counter", {"driver": "570.1"})

    def work() -> None:
        nvml.ledger.joules += 2.5

    stretch = meter_stretch(meter, work, 0.0, 5)
    assert stretch.joules == pytest.approx(2.5 * stretch.repeats)


def test_boards_without_a_counter_are_sampled(nvml: FakeNvml) -> None:
    nvml.refused = {"energy"}
    meter = open_meter("auto", CUDA)
    assert (meter.name, meter.kind) == ("nvml-power", "sampled power")
    nvml.refused = {"energy", "power"}
    with pytest.raises(NoMeter, match=r"nvml: .*TotalEnergy.*Not Supported; nvml-power: .*PowerUsage.*; codecarbon: "):
        open_meter("auto", CUDA)


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda patch, fake: fake.refused.add("init"), "Not Supported"),
        (lambda patch, fake: patch.setitem(sys.modules, "pynvml", None), r'pip install "evenbits\[energy\]"'),
        (
            lambda patch, fake: patch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(uuid="x")),
            "no board has the UUID x",
        ),
    ],
)
def test_why_nvml_cannot_be_used(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, break_it: Callable[[Any, Any], None], reason: str
) -> None:
    break_it(monkeypatch, nvml)
    with pytest.raises(NoMeter, match=reason):
        open_meter("nvml", CUDA)


def test_nvml_sees_the_peak_of_this_process(nvml: FakeNvml) -> None:
    own = SimpleNamespace(pid=os.getpid(), usedGpuMemory=100)
    nvml.processes = [SimpleNamespace(pid=-1, usedGpuMemory=9000), own]
    with BoardPeak(Board(CUDA)) as peak:
        own.usedGpuMemory = 500
        deadline = time.monotonic() + 10
        while peak.peak < 500 and time.monotonic() < deadline:
            time.sleep(0.001)
        own.usedGpuMemory = 300
    assert (peak.baseline, peak.peak, peak.failed) == (100, 500, None)
    assert peak.meter.startswith("NVML memory of the process")


def test_nvml_that_does_not_know_the_process_tells_of_the_board(nvml: FakeNvml) -> None:
    nvml.used = 70
    with BoardPeak(Board(CUDA)) as peak:
        nvml.used = 90
    assert (peak.baseline, peak.peak) == (70, 90)
    assert peak.meter.startswith("NVML memory in use on the board")
    with BoardPeak(Board(CUDA)) as peak:
        nvml.refused = {"memory"}
    assert peak.failed is not None
    assert "Not Supported" in peak.failed


@pytest.mark.parametrize("breaks", [False, True])
def test_memory_by_nvml_stands_beside_the_allocators(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, breaks: bool
) -> None:
    nvml.used = 400
    monkeypatch.setattr(profiler, "_board", lambda subject, remarks: Board(CUDA))
    loads = 0

    @dataclass
    class OnBoard(LlamaSubject):
        def load(self, weights: Weights = "restored") -> tuple[nn.Module, Any]:
            nonlocal loads
            loads += 1
            model, tokenizer = super().load()
            nvml.used = 1000
            weakref.finalize(model, setattr, nvml, "used", 400)  # it is loaded twice
            return model, tokenizer

    ledger = Ledger()

    def spend(joules: float) -> None:
        nvml.used = 1500
        nvml.refused = {"memory"} if breaks and loads == 2 else set()  # while inference is metered

    ledger.spent = spend
    options = HardwareOptions(prompt_tokens=12, decode_tokens=2, repeats=2, warmup=1)
    found = profiler.HardwareProfiler(options).profile(OnBoard(ledger, sizes={"linear": 1, "model": 2}))
    values = {m.name: m for m in found if isinstance(m, Measurement)}
    assert values["memory_load_nvml_bytes"].value == 600
    assert "NVML" in values["memory_load_nvml_bytes"].fingerprint["meter"]
    assert "NVML" not in values["memory_load_bytes"].fingerprint["meter"]
    remarks = [m.text for m in found if isinstance(m, Remark)]
    if breaks:
        assert "memory_inference_nvml_bytes" not in values
        assert len(remarks) == 1
        assert remarks[0].startswith("memory_inference was not measured by NVML")
    else:
        assert values["memory_inference_nvml_bytes"].value == 1100
        assert not remarks


def test_without_nvml_a_gpu_keeps_the_allocators_figures(nvml: FakeNvml) -> None:
    nvml.refused = {"init"}
    remarks: list[Finding] = []
    assert profiler._board(LlamaSubject(Ledger(), device=CUDA), remarks) is None
    assert [m.text for m in remarks if isinstance(m, Remark)] == ["no memory was measured by NVML: NVML: Not Supported"]
    assert profiler._board(LlamaSubject(Ledger()), remarks) is None
    assert len(remarks) == 1  # nothing to say on a CPU
