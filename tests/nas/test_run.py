"""Run folders: made, taken up again, refused, locked, logged."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from nas.errors import InvalidRun
from nas.evaluation import Evaluation
from nas.run import FORMAT, Run, changed_versions, open_run, resume_or_create, versions, without_password


def manifest(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "format": FORMAT,
        "id": "abc",
        "created": "2026-01-01T00:00:00.000+00:00",
        "seed": 0,
        "target": "null",
        "settings": {"sampler": "tpe", "budget_bytes": 1000, "max_latency_s": None},
        "versions": {},
        "device": {"name": "null"},
        "corpus": {"name": "sotu", "sha256": "a" * 64},
        "space": {"name": "tiny", "parameters": {"d_model": 16}},
    }
    return values | changes


def test_a_new_folder_becomes_a_run_and_is_taken_up_again(tmp_path: Path) -> None:
    run = resume_or_create(tmp_path / "deep" / "run", manifest())
    assert run.manifest == manifest()
    assert run.name == "run"
    again = resume_or_create(tmp_path / "deep" / "run", manifest(id="other", created="later", versions={"torch": "9"}))
    assert again.manifest["id"] == "abc"
    assert open_run(run.path).manifest == manifest()


def test_a_folder_left_by_a_process_that_died_at_once_is_used(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    (tmp_path / ".manifest.json.1-a.part").write_text("{")
    assert resume_or_create(tmp_path, manifest()).manifest["id"] == "abc"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "was made with --seed 0, not 1"),
        ({"device": {"name": "local"}}, "was made with --target null, not local"),
        ({"targets": [{"name": "null"}, {"name": "pi5"}]}, "was made with --target null, not null, pi5"),
        ({"targets": [{"name": "null", "cores": 4}]}, r"was made on another machine \(cores unset, not 4\)"),
        ({"settings": {"sampler": "gp", "budget_bytes": 1000, "max_latency_s": None}}, "was made with --sampler tpe, not gp"),
        ({"settings": {"sampler": "tpe", "budget_bytes": 2000, "max_latency_s": None}}, "was made with --budget 1000, not 2000"),
        ({"settings": {"sampler": "tpe", "budget_bytes": 1000, "max_latency_s": 0.5}}, "was made with --max-latency unset, not 0.5"),
        (
            {"corpus": {"name": "notes", "sha256": "b" * 64}},
            r"was made with --corpus sotu \(sha256 aaaaaaaaaaaa\), not notes \(sha256 bbbb",
        ),
        (
            {"device": {"name": "null", "cpu": "znver4"}},
            r"was made on another machine \(cpu unset, not znver4\), whose times do not compare",
        ),
        ({"space": {"name": "phone", "parameters": {}}}, "was made with --space tiny, not phone"),
        ({"space": {"name": "tiny", "parameters": {"d_model": 32}}}, "was made when space 'tiny' had other parameters"),
    ],
)
def test_other_settings_are_refused_naming_the_difference(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    resume_or_create(tmp_path / "run", manifest())
    with pytest.raises(InvalidRun, match=message) as error:
        resume_or_create(tmp_path / "run", manifest(**changes))
    assert "another --run" in str(error.value)
    assert "\n" not in str(error.value)
    assert open_run(tmp_path / "run").manifest == manifest()


def test_the_same_text_by_another_path_and_the_same_machine_otherwise_described_go_on(tmp_path: Path) -> None:
    resume_or_create(tmp_path / "run", manifest())
    other = manifest(
        corpus={"name": "copy", "source": "elsewhere/copy.txt", "sha256": "a" * 64}, device={"name": "null", "read_bytes_per_s": 2.0}
    )
    assert resume_or_create(tmp_path / "run", other).manifest == manifest()


def test_other_versions_are_named(tmp_path: Path) -> None:
    assert changed_versions(Run(tmp_path, manifest(versions=versions()))) is None
    changed = changed_versions(Run(tmp_path, manifest(versions=versions() | {"torch": "0.1"})))
    assert changed is not None
    assert f"torch 0.1, now {versions()['torch']}" in changed
    assert "numpy" not in changed


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:s3cret@host/db", "postgresql://me:***@host/db"),
        ("postgresql:/me:s3cret@host/db", "postgresql:/me:***@host/db"),
        ("mysql+pymysql://host/db?user=me&password=s3cret&x=1", "mysql+pymysql://host/db?user=me&password=***&x=1"),
        ("sqlite:////tmp/a@b:c.db", "sqlite:////tmp/a@b:c.db"),
    ],
)
def test_passwords_are_not_shown(url: str, shown: str) -> None:
    assert without_password(url) == shown
    assert without_password(shown) == shown


def test_another_storage_is_refused_without_a_password_and_another_password_is_not(tmp_path: Path) -> None:
    def with_storage(url: str) -> dict[str, Any]:
        return manifest(settings={"storage": url})

    resume_or_create(tmp_path / "run", with_storage("postgresql://me:old@a/db"))
    resume_or_create(tmp_path / "run", with_storage("postgresql://me:new@a/db"))
    with pytest.raises(InvalidRun, match=r"--storage postgresql://me:\*\*\*@a/db, not postgresql://me:\*\*\*@b/db"):
        resume_or_create(tmp_path / "run", with_storage("postgresql://me:new@b/db"))


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(InvalidRun, match=r"holds 'thesis.txt' and no manifest.json, so it is not a run"):
        resume_or_create(tmp_path, manifest())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(InvalidRun, match=r"is not a run: it has no manifest.json"):
        open_run(tmp_path)
    with pytest.raises(InvalidRun, match="does not exist"):
        open_run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is damaged"),
        ("[]", "lacks 'format'"),
        ('{"format": 1}', "lacks 'seed'"),
        (json.dumps(manifest(format=99)), f"has format 99, not {FORMAT}"),
    ],
)
def test_a_damaged_manifest_is_refused_and_kept(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    for attempt in (lambda: open_run(tmp_path), lambda: resume_or_create(tmp_path, manifest())):
        with pytest.raises(InvalidRun, match=message):
            attempt()
    assert (tmp_path / "manifest.json").read_text() == text


@pytest.mark.parametrize("where", ["file/run", "/proc/edgewise-run", "n" * 300])
def test_a_place_that_cannot_be_written_is_a_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(InvalidRun, match=r"cannot be written \(.+\); give another --run"):
        resume_or_create(Path(where), manifest())


def test_only_one_process_searches_a_run(tmp_path: Path) -> None:
    run = resume_or_create(tmp_path / "run", manifest())
    with run.locked():
        with pytest.raises(InvalidRun, match=rf"is in use by process {os.getpid()}; wait for it"), Run(run.path, run.manifest).locked():
            pass
        assert open_run(run.path).evaluations() == []
    with run.locked():
        pass


def test_evaluations_come_back_in_order_with_the_seconds_of_the_log(tmp_path: Path) -> None:
    run = resume_or_create(tmp_path / "run", manifest())
    for trial in (10, 2, 0):
        Evaluation(trial=trial, state="failed", reason="no").save(run.trial_path(trial))
    run.log(2, "train", "start")
    run.log(2, "train", "done", seconds=1.5)
    with (run.path / "log.jsonl").open("a") as file:
        file.write('{"trial": 0, "step": "train", "event": "do')
    (run.path / "trials" / "00002.json.damaged").write_text("{")
    found = run.evaluations()
    assert [e.trial for e in found] == [0, 2, 10]
    assert [dict(e.stage_s) for e in found] == [{}, {"train": 1.5}, {}]
    assert [entry["event"] for entry in run.log_entries()] == ["start", "done"]
    assert run.load(1) is None


def test_a_record_of_another_trial_is_damaged(tmp_path: Path) -> None:
    run = resume_or_create(tmp_path / "run", manifest())
    Evaluation(trial=3).save(run.trial_path(2))
    with pytest.raises(InvalidRun, match=r"00002.json is damaged: it holds trial 3"):
        run.load(2)


def test_setting_aside_never_overwrites(tmp_path: Path) -> None:
    run = resume_or_create(tmp_path / "run", manifest())
    run.trial_path(0).parent.mkdir()
    for text in ("a", "b", "c"):
        run.trial_path(0).write_text(text)
        run.set_aside(run.trial_path(0))
    assert sorted(p.read_text() for p in run.trial_path(0).parent.iterdir()) == ["a", "b", "c"]


def test_versions_name_what_results_depend_on() -> None:
    assert {"python", "edgewise", "torch", "apache-tvm", "optuna", "numpy", "tokenizers"} == versions().keys()
    assert versions()["torch"][0].isdigit()
