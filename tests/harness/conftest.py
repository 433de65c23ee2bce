"""A tiny model, texts, a plugin that misbehaves, and evenbits as a process of its own."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from evenbits.executor import LocalExecutor
from evenbits.plan import Plan, make_plan
from evenbits.plugins import Registry, load_plugins
from evenbits.record import Record
from evenbits.run import Display, Run
from evenbits.store import Results
from evenbits.suite import Suite, read_suite

HERE = Path(__file__).parent
WORDS = [f"w{index}" for index in range(60)]


def make_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A random Llama with two blocks and a tokenizer of sixty words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        **{**sizes, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64,
           "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, **changes}
    )  # fmt: skip
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_rng_state(state)
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {word: 3 + index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


FOUR = """[
    { name = "rtn", budget = "free", options.bits = 3, options.group_size = 16 },
    { name = "gptq", budget = "free", options.bits = 3, options.group_size = 16 },
    { name = "kmeans", budget = "free", options.d = 2, options.codebook_size = 16 },
    { name = "nf4", budget = "free", options.block_size = 32 },
]"""


@dataclass(frozen=True)
class Tiny:
    """Paths of a tiny model with train and test text."""

    model: Path
    train: Path
    test: Path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Shared by the session: copy the model before changing it."""
    folder = tmp_path_factory.mktemp("tiny")
    model = make_model(folder / "model")
    texts = []
    for seed, name in enumerate(("train", "test")):
        draw = random.Random(seed)
        path = folder / f"{name}.txt"
        path.write_text(" ".join(draw.choices(WORDS, k=1500)))
        texts.append(path)
    return Tiny(model, *texts)


@pytest.fixture
def own_model(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny.model, tmp_path / "own-model"))


@dataclass(frozen=True)
class Suites:
    """Texts of suites on the tiny model with perplexity."""

    tiny: Tiny
    four: str = FOUR

    def text(self, methods: str = FOUR, *, top: str = "", tables: str = "", model: Path | None = None) -> str:
        """`methods` is TOML, `top` goes before the first table, `tables` at the end."""
        return f"""
name = "tiny"
model = {{ path = "{model or self.tiny.model}", name = "tiny" }}
dtype = "float32"
methods = {methods}
{top}

[calibration]
corpus = {{ name = "text", path = "{self.tiny.train}" }}
samples = 4
length = 32

[[evaluators]]
name = "perplexity"
options.corpus = {{ name = "text", path = "{self.tiny.test}" }}
options.context = 32
{tables}
"""

    def trouble(self, *whats: str, **parts: Any) -> str:
        """The troublesome method once for each kind of trouble, and round-to-nearest after it."""
        entries = [f'{{ name = "trouble", label = "{w}", budget = "free", options.what = "{w}" }}' for w in whats]
        return self.text("[" + ", ".join([*entries, '{ name = "rtn", budget = "free" }']) + "]", **parts)


@pytest.fixture(scope="session")
def suites(tiny: Tiny) -> Suites:
    return Suites(tiny)


@pytest.fixture(scope="session")
def trouble_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH that holds the plugin with the metadata an installation would have made."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(HERE / "trouble" / "evenbits_trouble.py", folder)
    info = folder / "evenbits_trouble-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: evenbits-trouble\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[evenbits]\ntrouble = evenbits_trouble\n")
    return folder


@dataclass
class Evenbits:
    """The command line in a process of its own, started in `folder`."""

    folder: Path
    path: tuple[Path, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def popen(self, *arguments: Any, **options: Any) -> subprocess.Popen[str]:
        env = {**os.environ, "EVENBITS_DISABLE": "mlflow", "COLUMNS": "200", **self.environment}
        env["PYTHONPATH"] = os.pathsep.join([*map(str, self.path), env.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        return subprocess.Popen(
            [sys.executable, "-m", "evenbits.cli", *map(str, arguments)],
            cwd=self.folder, env=env, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
        )  # fmt: skip

    def __call__(self, *arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        process = self.popen(*arguments, **options)
        try:
            out, error = process.communicate(timeout=120)
        except BaseException:
            process.kill()
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, error)

    def run(self, suite: str, results: str = "results", **options: Any) -> subprocess.CompletedProcess[str]:
        """`evenbits run` on a suite's text, without the report."""
        path = self.folder / "suite.toml"
        path.write_text(suite)
        return self("run", path, "--results", results, "--no-report", **options)

    def records(self, results: str = "results", suite: str = "tiny") -> list[Any]:
        return Results(self.folder / results).records(suite)[0]


@pytest.fixture
def evenbits(tmp_path: Path, trouble_path: Path) -> Evenbits:
    return Evenbits(tmp_path, (trouble_path,))


class Notes(Display):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.notices: list[str] = []
        self.stages: list[tuple[str, str]] = []

    def notice(self, message: str) -> None:
        self.notices.append(message)

    def stage(self, trial: Any, stage: str, done: int, total: int, what: str) -> None:
        if (trial.label, stage) not in self.stages:
            self.stages.append((trial.label, stage))


@dataclass
class Here:
    """Runs in this process; the children come from one fork server for the whole session."""

    folder: Path

    def read(self, text: str) -> Suite:
        path = self.folder / "suite.toml"
        path.write_text(text)
        return read_suite(path, load_plugins())

    def plan(self, text: str) -> Plan:
        return make_plan(self.read(text), load_plugins())

    def run(
        self,
        text: str,
        results: str = "results",
        registry: Registry | None = None,
        conclude: Callable[[], None] = lambda: None,
    ) -> tuple[list[Record], Notes]:
        plan, notes, store = self.plan(text), Notes(), Results(self.folder / results)
        with store.lock():
            store.check_schema(create=True)
            executor = LocalExecutor(plan.suite.limits.workers, ("transformers.models.llama.modeling_llama",))
            records = Run(plan, registry or load_plugins(), store, executor, notes, conclude).go()
        return records, notes


@pytest.fixture
def here(tmp_path: Path, trouble_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    monkeypatch.syspath_prepend(str(trouble_path))
    monkeypatch.setenv("EVENBITS_DISABLE", "mlflow")
    return Here(tmp_path)
