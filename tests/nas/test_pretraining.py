"""Training for real: killed at any moment it ends as if it had not been; data are read in order; what comes out loads."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from nas.corpus import Corpus, load_corpus
from nas.errors import InvalidRun, UserError
from nas.export import load_exported
from nas.pretraining import Interrupted, Plan, Trained, TrainSettings, plan_of, pretrain, training_flops
from nas.token_file import IDS, TokenFile, Windows, token_file
from nas.tokenizer import Tokenizer, train_tokenizer
from nas.training import evaluate
from nas.training_folder import TrainingFolder, check_free, training_folder
from search_spaces.config import SLMConfig
from search_spaces.model import SLM

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def some_text() -> Corpus:
    whole = load_corpus()
    train, validation = tuple(d[:1500] for d in whole.train[:20]), tuple(d[:400] for d in whole.validation[:3])
    return Corpus(name="slice <b>", licence="none", train=train, validation=validation)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return some_text()


@pytest.fixture(scope="module")
def tokenizer(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(corpus, 300, tmp_path_factory.mktemp("tokenizers") / "300.json")


CONFIG = SLMConfig(vocab_size=300, d_model=16, num_layers=1, num_heads=2, context=32)
SETTINGS = TrainSettings(tokens=3000, batch_tokens=128, window=32, accumulate=2)


class Watcher:
    """A view that remembers, and acts after a step."""

    def __init__(self, at: int = -1, act: Any = None) -> None:
        self.at, self.act = at, act
        self.notes: list[str] = []
        self.steps: list[int] = []
        self.plans: list[tuple[Plan, int]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def preparing(self, share: float) -> None:
        assert 0 < share <= 1

    def begin(self, plan: Plan, done: int, flops_per_token: float) -> None:
        self.plans.append((plan, done))

    def stepped(self, done: int, loss: float) -> None:
        self.steps.append(done)
        if done == self.at:
            self.act()

    def scoring(self) -> None:
        pass


def folder_of(path: Path, corpus: Corpus, settings: TrainSettings = SETTINGS, **changes: Any) -> TrainingFolder:
    values = {"name": "a<b>", "config": CONFIG, "tokenizer": None, "init": None, "device": "cpu", "threads": 1, **changes}
    return training_folder(path, corpus=corpus, settings=settings, **values)


def run(
    path: Path,
    corpus: Corpus,
    settings: TrainSettings = SETTINGS,
    view: Watcher | None = None,
    every: float = 300.0,
    init: SLM | None = None,
) -> Trained:
    folder = folder_of(path, corpus, settings, init=init)
    with folder.locked():
        used = train_tokenizer(corpus, 300, folder.tokenizer_path)
        options: dict[str, Any] = {"device": CPU, "threads": 1, "checkpoint_every_s": every, "init": init}
        return pretrain(folder, CONFIG, corpus, used, settings, view or Watcher(), **options)


def curve(path: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in map(json.loads, (path / "log.jsonl").read_text().splitlines())]


def weights(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)


@pytest.fixture(scope="module")
def trained(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trained]:
    path = tmp_path_factory.mktemp("trained") / "out"
    return path, run(path, corpus)


# --- killed and gone on with ------------------------------------------------------------------

# Forks of one process that has everything imported: so a kill costs no start of PyTorch. It touches no tokenizer itself, as
# those have threads that a fork would not have.
NURSERY = """
    import os, random, signal, sys, time
    from pathlib import Path
    import torch
    import nas.pretraining, nas.huggingface.export, nas.training_report, plotly.offline
    sys.path.insert(0, sys.argv[1])
    import test_pretraining as tests

    torch.set_num_threads(1)
    whole, broken, kills = Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    rng, corpus = random.Random(7), tests.some_text()

    def start(path):
        pid = os.fork()
        if pid == 0:
            tests.train_for_kills(path, corpus)
            os._exit(0)
        return pid

    def lines():
        return (broken / "log.jsonl").read_bytes().count(b"\\n") if (broken / "log.jsonl").exists() else 0

    assert os.waitpid(start(whole), 0)[1] == 0
    for kill in range(kills):
        enough = lines() + rng.randint(1, 8)
        pid = start(broken)
        # After some steps in most cases, at any moment from the first instruction on in the others.
        while kill % 4 and lines() < enough:
            ended, status = os.waitpid(pid, os.WNOHANG)
            assert not ended, f"ended before kill {kill} with {status}"
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.005 if kill % 4 else 0.2))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert os.waitpid(start(broken), 0)[1] == 0
"""


def train_for_kills(path: Path, corpus: Corpus) -> None:
    """What is killed: many steps, a checkpoint after about every third."""
    run(path, corpus, dataclasses.replace(SETTINGS, tokens=12_000, decay="cosine"), every=0.02)


def test_killed_at_random_moments_the_loss_curve_is_the_same_to_the_bit(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    arguments = [str(Path(__file__).parent), str(whole), str(broken), "8"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(NURSERY), *arguments], env=environment, check=True, timeout=120)
    expected = curve(whole)
    assert [step for step, _ in expected] == list(range(1, 95))
    assert curve(broken) == expected
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(broken)[name], tensor), name
    results = [json.loads((path / "train.json").read_text())["result"] for path in (whole, broken)]
    for key in ("val_bpb", "val_bpb_stderr", "final_train_bpb", "tokens", "steps"):
        assert results[0][key] == results[1][key]
    assert not (broken / "work").exists()


def test_asked_to_end_it_ends_after_the_step_and_goes_on(corpus: Corpus, tmp_path: Path, trained: tuple[Path, Trained]) -> None:
    view = Watcher(at=5, act=lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted):
        run(tmp_path / "out", corpus, view=view)
    assert signal.getsignal(signal.SIGTERM) is before
    assert view.steps[-1] in (5, 6)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert "It has not ended" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    again = Watcher()
    run(tmp_path / "out", corpus, view=again)
    assert again.plans[0][1] == view.steps[-1]
    assert curve(tmp_path / "out") == curve(trained[0])
    assert weights(tmp_path / "out").keys() == weights(trained[0]).keys()
    assert all(torch.equal(tensor, weights(trained[0])[name]) for name, tensor in weights(tmp_path / "out").items())


def test_damaged_checkpoint_is_refused_and_half_a_new_one_ignored(corpus: Corpus, tmp_path: Path) -> None:
    path = tmp_path / "out"
    with pytest.raises(Interrupted):
        run(path, corpus, view=Watcher(at=3, act=lambda: os.kill(os.getpid(), signal.SIGINT)))
    checkpoint = path / "work" / "checkpoint.safetensors"
    data = checkpoint.read_bytes()
    with safe_open(checkpoint, framework="pt") as file:
        assert {n.split(".")[0] for n in file.keys()} >= {"model", "exp_avg", "exp_avg_sq", "losses", "random"}  # noqa: SIM118
    checkpoint.write_bytes(data[: len(data) // 2])
    with pytest.raises(InvalidRun, match=r"checkpoint\.safetensors' cannot be read \(.*\); delete it to begin again from nothing$"):
        run(path, corpus)
    checkpoint.write_bytes(data)
    (path / "work" / ".checkpoint.safetensors.1-ab.part").write_bytes(data[:100])
    assert run(path, corpus).steps == 23


def test_the_same_folder_takes_no_other_training(corpus: Corpus, tmp_path: Path) -> None:
    path = tmp_path / "out"
    folder_of(path, corpus, dataclasses.replace(SETTINGS, window=10**6))
    folder_of(path, corpus)  # nothing was trained yet
    (path / "log.jsonl").touch()
    for settings, message in [
        (dataclasses.replace(SETTINGS, seed=1), "--seed 0, not 1"),
        (dataclasses.replace(SETTINGS, learning_rate=1e-3), "--lr 0.0008, not 0.001"),
        (dataclasses.replace(SETTINGS, arithmetic="bf16"), "--precision fp32, not bf16"),
        (dataclasses.replace(SETTINGS, batch_tokens=None), "--batch-tokens 128, not unset"),
    ]:
        with pytest.raises(InvalidRun, match=f"was begun with {message}; use the same to go on with it, or give another --out$"):
            folder_of(path, corpus, settings)
    with pytest.raises(InvalidRun, match="was begun with CONFIG with d_model= 16, not 32;"):
        folder_of(path, corpus, config=dataclasses.replace(CONFIG, d_model=32, head_dim=8))
    with pytest.raises(InvalidRun, match="was begun with --corpus"):
        folder_of(path, dataclasses.replace(corpus, train=corpus.train[1:]))
    with pytest.raises(InvalidRun, match="was begun with --init unset"):
        folder_of(path, corpus, init=SLM(CONFIG).initialise(0))
    with pytest.raises(InvalidRun, match="was begun with --device cpu, not cuda;"):
        folder_of(path, corpus, device="cuda")
    with folder_of(path, corpus).locked(), pytest.raises(InvalidRun, match=r"is in use by process .*give another --out$"):
        subprocess_lock(path)
    (path / "train.json").write_text("{")
    with pytest.raises(InvalidRun, match=r"train\.json is damaged"):
        folder_of(path, corpus)


def subprocess_lock(path: Path) -> None:
    """The lock taken once more: another open file counts as another process."""
    with TrainingFolder(path, {}).locked():
        pass


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    check_free(tmp_path / "new")
    check_free(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InvalidRun, match=r"holds 'notes\.txt' and no train\.json; give a new or empty folder$"):
        check_free(tmp_path)
    with pytest.raises(InvalidRun, match=r"is a file; give a folder$"):
        check_free(tmp_path / "notes.txt")


# --- what comes out ---------------------------------------------------------------------------


def test_it_learns_and_the_folder_is_a_model(corpus: Corpus, trained: tuple[Path, Trained]) -> None:
    path, result = trained
    model, tokenizer = load_exported(path)
    assert model.config == CONFIG
    assert evaluate(model, tokenizer, corpus.validation, 32) == (result.val_bpb, result.val_bpb_stderr)
    untrained, _ = evaluate(SLM(CONFIG).initialise(0), tokenizer, corpus.validation, 32)
    assert result.val_bpb < 0.95 * untrained
    assert result.final_train_bpb == pytest.approx(result.val_bpb, rel=0.15)
    assert (result.steps, result.tokens) == (23, 23 * 128)
    assert result.epochs == pytest.approx(23 * 4 / ((len(token_ids(corpus, tokenizer)) - 1) // 32))
    assert "licence: none" in (path / "README.md").read_text(encoding="utf-8")
    assert "slice <b>" not in (path / "README.md").read_text(encoding="utf-8")


def token_ids(corpus: Corpus, tokenizer: Tokenizer) -> list[int]:
    end = tokenizer.end_of_text
    return [end, *(i for document in corpus.train for i in (*tokenizer.encode(document), end))]


def test_the_report_draws_every_step(trained: tuple[Path, Trained]) -> None:
    page = (trained[0] / "report.html").read_text(encoding="utf-8")
    text = page.split('<script type="application/json" id="figures">')[1].split("</script>")[0]
    figure = json.loads(text)["front"]["loss"]
    steps, smooth, held_out = figure["data"]
    assert steps["x"] == [128 * (i + 1) for i in range(23)]
    per_byte = steps["y"][0] / curve(trained[0])[0][1]
    assert steps["y"] == pytest.approx([loss * per_byte for _, loss in curve(trained[0])], rel=1e-6)
    assert held_out["y"] == [trained[1].val_bpb]
    assert len(smooth["y"]) == 23
    assert "a&lt;b&gt;" in page
    assert "slice <b>" not in page


def test_weights_to_begin_with_are_begun_with(corpus: Corpus, tmp_path: Path, trained: tuple[Path, Trained]) -> None:
    model, _ = load_exported(trained[0])
    run(tmp_path / "out", corpus, dataclasses.replace(SETTINGS, tokens=256, seed=5), init=model)
    first = curve(tmp_path / "out")[0][1]
    fresh, last = curve(trained[0])[0][1], curve(trained[0])[-1][1]
    assert first == pytest.approx(last, rel=0.1)
    assert first < 0.9 * fresh
    assert "weights given with --init" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_divergence_ends_it(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^the loss diverged at step \d+ .*; train again with a lower --lr and another --out$"):
        run(tmp_path / "out", corpus, dataclasses.replace(SETTINGS, learning_rate=1e6))


# --- the text ---------------------------------------------------------------------------------


def test_token_file_is_the_text_and_is_written_once(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    shares: list[float] = []
    text = token_file(tmp_path, corpus, tokenizer, shares.append)
    assert text.ids.tolist() == token_ids(corpus, tokenizer)
    assert text.ids.dtype == np.uint16
    assert shares[-1] == 1.0
    assert text.bytes_per_token == pytest.approx(corpus.train_bytes / (len(text.ids) - 1))
    token_file(tmp_path, corpus, tokenizer, lambda _: pytest.fail("written again"))
    # Half of it, or of another text: written again.
    (tmp_path / IDS).write_bytes((tmp_path / IDS).read_bytes()[:-2])
    assert token_file(tmp_path, corpus, tokenizer).ids.tolist() == text.ids.tolist()
    other = dataclasses.replace(corpus, train=corpus.train[:3])
    assert token_file(tmp_path, other, tokenizer).ids.tolist() == token_ids(other, tokenizer)


def test_long_documents_are_tokenised_in_pieces(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.token_file._AT_ONCE_BYTES", 40)
    documents = ("one line of words\n" * 9, "short", "two\n" * 30)
    text = token_file(tmp_path, Corpus(name="", licence="", train=documents, validation=("x",)), tokenizer)
    pieces = tokenizer.decode(text.ids.tolist()).split("<|endoftext|>")
    assert pieces == ["", *documents, ""]


@pytest.mark.parametrize(("length", "window"), [(50, 7), (64, 7), (8, 7), (29, 1)])
def test_windows_are_read_once_each_time_through(length: int, window: int) -> None:
    ids = np.arange(length, dtype=np.uint16)
    windows = Windows(ids, window, seed=3)
    count = windows.per_epoch
    assert count == (length - 1) // window
    inputs, targets = windows.read(0, 4 * count)
    assert (targets == inputs + 1).all()
    assert inputs.dtype == np.int64
    epochs = inputs.reshape(4, count, window)
    for epoch in epochs:
        assert sorted(epoch.flatten().tolist()) == list(range(epoch.min(), epoch.min() + count * window))
    if count > 3:
        assert len({tuple(e[:, 0].tolist()) for e in epochs}) > 1
    # Any part of it is the same, whoever reads it.
    again = Windows(ids, window, seed=3)
    for first, number in ((2 * count, 1), (0, 1), (count - 1, min(2, count))):
        assert (again.read(first, number)[0] == inputs[first : first + number]).all()


def text_of(tokens: int) -> TokenFile:
    return TokenFile(ids=np.zeros(tokens + 1, dtype=np.uint16), text_bytes=4 * tokens)


def test_plan_follows_from_settings() -> None:
    config = SLMConfig(vocab_size=300, d_model=16, num_layers=1, num_heads=2, context=2048)
    plan = plan_of(TrainSettings(tokens=10_000_000), config, text_of(5_000_000))
    assert (plan.window, plan.batch_tokens, plan.accumulate) == (1024, 4096, 1)
    assert plan.tokens == pytest.approx(10_000_000, rel=1e-3)
    assert plan.epochs == pytest.approx(2.0, rel=1e-3)
    assert plan_of(TrainSettings(text_bytes=40_000_000), config, text_of(5_000_000)) == plan
    large = plan_of(TrainSettings(tokens=10**10), config, text_of(10**7))
    assert (large.batch_tokens, large.accumulate) == (131_072, 8)
    assert plan_of(TrainSettings(tokens=100, window=2048, batch_tokens=1), config, text_of(50)).window == 50
    with pytest.raises(UserError, match=r"^--window 4096 is above the model's context=2048; give at most that$"):
        plan_of(TrainSettings(tokens=100, window=4096), config, text_of(10_000))
    with pytest.raises(
        UserError, match=r"^--accumulate 9 is more than the 2 windows of a step; give at most that, or more --batch-tokens$"
    ):
        plan_of(TrainSettings(tokens=10_000, batch_tokens=2048, accumulate=9), config, text_of(10_000))


def test_settings_that_cannot_be_are_refused() -> None:
    for values in ({}, {"tokens": 1, "text_bytes": 1}):
        with pytest.raises(UserError, match=r"^how long to train is not clear; give either --tokens or --bytes$"):
            TrainSettings(**values)
    with pytest.raises(UserError, match=r"^window=0 is below 1; give a positive integer$"):
        TrainSettings(tokens=1, window=0)
    with pytest.raises(UserError, match=r"^learning_rate=nan is not a positive number"):
        TrainSettings(tokens=1, learning_rate=math.nan)


def test_training_takes_six_flops_a_weight_and_token() -> None:
    config = SLMConfig(vocab_size=300, d_model=32, num_layers=3, num_heads=2, context=64, ffn_dim=80)
    products = 3 * (4 * 32 * 32 + 3 * 32 * 80) + 300 * 32
    pairs = 64 * 65 / 2
    assert training_flops(config, 64) == pytest.approx(6 * products + 3 * 3 * pairs * 2 * 2 * 32 / 64)
