"""A run's folder is refused, resumed, replaced, and left as found when the run fails."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch

from lit_prune.cli.runfolder import ASIDE, RunFolder, is_run_entry, worth_keeping
from lit_prune.errors import UserError

_CONFIG = "# lit_prune==0.1.0\n"


@pytest.fixture(autouse=True)
def _single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def listing(path: Path) -> dict[str, str | None]:
    """Every file with its text, and every folder."""
    return {
        str(child.relative_to(path)): child.read_bytes().decode("latin-1")
        if child.is_file()
        else None
        for child in sorted(path.rglob("*"))
    }


def write(folder: Path, *names: str, text: str = "old") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        content = whole(text) if name.endswith(".ckpt") else text
        (folder / name).write_text(
            _CONFIG if name == "config.yaml" else content, encoding="latin-1", newline=""
        )


def whole(text: str) -> str:
    """The bytes of a checkpoint that holds a text."""
    file = io.BytesIO()
    content = {"state_dict": {}, "global_step": 1, "pytorch-lightning_version": "2.6.6"}
    torch.save({"text": text, **content}, file)
    return file.getvalue().decode("latin-1")


def fail(folder: Path, *writes: str, **arguments: object) -> None:
    """Run, write some files, fail."""

    def training() -> None:
        write(folder, *writes, text="new")
        raise ZeroDivisionError

    run = RunFolder(folder, **arguments)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ZeroDivisionError), run:
        training()


@pytest.mark.parametrize(
    "name", ["config.yaml", "checkpoints/last.ckpt", "pruned/x", "report.json", "logs/x"]
)
def test_refuses_a_folder_that_holds_a_run(tmp_path: Path, name: str) -> None:
    write(tmp_path, name, "notes.txt")
    before = listing(tmp_path)
    with pytest.raises(UserError, match=rf"holds a run \({name.split('/')[0]}\).*--overwrite"):
        RunFolder(tmp_path)
    assert listing(tmp_path) == before


def test_takes_a_folder_with_other_things(tmp_path: Path) -> None:
    write(tmp_path, "notes.txt", "reports/x")
    with RunFolder(tmp_path) as run:
        write(tmp_path, "config.yaml")
    assert run.ckpt_path is None
    assert set(listing(tmp_path)) == {"notes.txt", "reports", "reports/x", "config.yaml"}


def test_a_failed_run_removes_the_folders_it_made(tmp_path: Path) -> None:
    fail(tmp_path / "a" / "b", "config.yaml", "logs/version_0/metrics.csv")
    assert listing(tmp_path) == {}


def test_a_failed_run_leaves_its_neighbours_alone(tmp_path: Path) -> None:
    """Runs that started together each find out who made the folder above them."""
    first, second = RunFolder(tmp_path / "runs/a"), RunFolder(tmp_path / "runs/deep/b")
    with second:
        with pytest.raises(ZeroDivisionError), first:
            raise ZeroDivisionError
        write(second.path, "config.yaml")
    fail(tmp_path / "runs/deep/c", "config.yaml")
    assert set(listing(tmp_path)) == {"runs", "runs/deep", "runs/deep/b", "runs/deep/b/config.yaml"}


def test_a_failed_run_leaves_what_came_into_folders_that_it_made(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    fail(runs / "a", "config.yaml", "mine.txt", "../b/checkpoints/last.ckpt")
    assert {name for name, content in listing(runs).items() if content is not None} == {
        *("a/mine.txt", "b/checkpoints/last.ckpt"),
    }


def test_a_failed_run_leaves_a_folder_as_it_was(tmp_path: Path) -> None:
    write(tmp_path, "notes.txt")
    before = listing(tmp_path)
    fail(
        tmp_path,
        "config.yaml",
        "logs/x",
        "checkpoints/x.tmp",
        ".pruned.tmp7/model",
        ".report.json.3",
    )
    assert listing(tmp_path) == before


def test_never_touches_what_is_not_a_runs(tmp_path: Path) -> None:
    write(tmp_path, "notes.txt")
    fail(tmp_path, "config.yaml", "train.log", "config.yaml.bak")
    assert set(listing(tmp_path)) == {"notes.txt", "train.log", "config.yaml.bak"}


@pytest.mark.parametrize(
    "result",
    [
        *("checkpoints/last.ckpt", "pruned/model", "pruned.old-7/model"),
        *("ckpts/step=1.ckpt", "checkpoints/a/b.ckpt", "step=1.ckpt"),
    ],
)
def test_a_failed_run_keeps_what_is_worth_keeping(tmp_path: Path, result: str) -> None:
    fail(tmp_path / "run", "config.yaml", result)
    assert {"config.yaml", result} <= set(listing(tmp_path / "run"))
    if "checkpoints/" not in result:
        with pytest.raises(UserError, match="has results without it"):
            RunFolder(tmp_path / "run", ckpt_path="last")


def test_checkpoints_of_others_do_not_count(tmp_path: Path) -> None:
    write(tmp_path, "other/checkpoints/last.ckpt", "mine.ckpt")
    before = listing(tmp_path)
    fail(tmp_path, "config.yaml")
    assert listing(tmp_path) == before
    fail(tmp_path, "config.yaml", ckpt_path="last")
    assert listing(tmp_path) == before


def test_what_a_killed_export_left_goes_with_the_run(tmp_path: Path) -> None:
    """It must not come back under the one that takes its place."""
    write(tmp_path, "config.yaml", "pruned.old-7/model", "pruned.tmp-7/model")
    with RunFolder(tmp_path, overwrite=True):
        assert not {"pruned", "pruned.old-7", "pruned.tmp-7"} & set(listing(tmp_path))
        write(tmp_path, "config.yaml")
    assert set(listing(tmp_path)) == {"config.yaml"}


def test_what_a_killed_export_moved_aside_is_put_back_by_a_resume(tmp_path: Path) -> None:
    write(tmp_path, "checkpoints/last.ckpt", "pruned.old-7/model", "pruned.tmp-7/model")
    with RunFolder(tmp_path, ckpt_path="last"):
        assert "pruned/model" in listing(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "pruned"]


def test_overwrite_replaces_a_run_on_success(tmp_path: Path) -> None:
    write(tmp_path, "config.yaml", "pruned/old", "report.json", "notes.txt")
    with RunFolder(tmp_path, overwrite=True):
        assert not (tmp_path / "pruned").exists()
        write(tmp_path, "config.yaml", "pruned/new", text="new")
    assert listing(tmp_path) == {
        "config.yaml": _CONFIG,
        "notes.txt": "old",
        "pruned": None,
        "pruned/new": "new",
    }


def test_overwrite_puts_the_old_run_back_on_failure(tmp_path: Path) -> None:
    write(tmp_path, "config.yaml", "pruned/old", "checkpoints/last.ckpt", "notes.txt")
    before = listing(tmp_path)
    fail(tmp_path, "config.yaml", "report.json", "logs/x", overwrite=True)
    assert listing(tmp_path) == before


def test_overwrite_keeps_both_when_the_new_run_has_results(tmp_path: Path) -> None:
    write(tmp_path, "config.yaml", "pruned/model")
    fail(tmp_path, "config.yaml", "checkpoints/last.ckpt", overwrite=True)
    names = listing(tmp_path)
    assert names["checkpoints/last.ckpt"] == whole("new")
    assert names[f"{ASIDE}{os.getpid()}/pruned/model"] == "old"
    with RunFolder(tmp_path, ckpt_path="last"):
        pass
    assert not any(name.startswith(ASIDE) for name in listing(tmp_path))


def test_overwrite_of_an_empty_folder_is_a_plain_run(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "new", overwrite=True):
        write(tmp_path / "new", "config.yaml")
    assert set(listing(tmp_path)) == {"new", "new/config.yaml"}


def test_overwrite_refuses_what_lit_prune_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mine: 1")
    write(tmp_path, "logs/server.log")
    before = listing(tmp_path)
    with pytest.raises(UserError, match=r"config\.yaml, logs of another origin"):
        RunFolder(tmp_path, overwrite=True)
    assert listing(tmp_path) == before


def test_overwrite_after_a_killed_overwrite(tmp_path: Path) -> None:
    write(tmp_path, f"{ASIDE}{os.getpid()}/pruned/model", "config.yaml")
    before = listing(tmp_path)
    fail(tmp_path, "config.yaml", overwrite=True)
    assert listing(tmp_path) == before
    with RunFolder(tmp_path, overwrite=True):
        write(tmp_path, "report.json")
    assert set(listing(tmp_path)) == {"report.json"}


def test_last_is_the_folders_own_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, "config.yaml", "checkpoints/last.ckpt", "logs/x")
    before = listing(tmp_path)
    run = RunFolder(tmp_path, ckpt_path="last")
    assert run.ckpt_path == str(tmp_path / "checkpoints" / "last.ckpt")
    with pytest.raises(ZeroDivisionError), run:
        raise ZeroDivisionError
    assert listing(tmp_path) == before


def test_last_starts_afresh_after_a_kill_before_the_first_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, "config.yaml", "logs/version_0/metrics.csv", "checkpoints/.last.ckpt.tmp3")
    before = listing(tmp_path)
    fail(tmp_path, "config.yaml", "logs/new", ckpt_path="last")
    assert listing(tmp_path) == before
    with RunFolder(tmp_path, ckpt_path="last") as run:
        write(tmp_path, "config.yaml")
    assert run.ckpt_path is None
    assert set(listing(tmp_path)) == {"config.yaml"}


def test_last_in_a_folder_that_is_not_there_starts_afresh(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", ckpt_path="last") as run:
        pass
    assert run.ckpt_path is None


def test_a_fresh_start_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunFolder(tmp_path, ckpt_path="last")
    assert capsys.readouterr().err == ""
    write(tmp_path, "config.yaml")
    RunFolder(tmp_path, ckpt_path="last")
    err = capsys.readouterr().err
    assert err == f"lit-prune: {tmp_path} holds a run without a checkpoint yet: it starts anew\n"


def test_last_never_replaces_results(tmp_path: Path) -> None:
    write(tmp_path, "config.yaml", "pruned/model")
    with pytest.raises(UserError, match=r"last\.ckpt"):
        RunFolder(tmp_path, ckpt_path="last")


def test_last_passes_over_a_damaged_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    write(tmp_path, "config.yaml", "checkpoints/previous.ckpt", "checkpoints/.last.ckpt.tmp3")
    (folder / "last.ckpt").write_text("PK")
    run = RunFolder(tmp_path, ckpt_path="last")
    assert run.ckpt_path == str(folder / "previous.ckpt")
    err = capsys.readouterr().err
    assert err.startswith(f"lit-prune: {folder}/last.ckpt is truncated or no checkpoint (")
    assert err.endswith(f": going on from {folder}/previous.ckpt\n")
    assert (folder / "last.ckpt").exists()
    monkeypatch.setenv("RANK", "1")
    with RunFolder(tmp_path, ckpt_path="last") as other:  # another process decides the same
        assert other.ckpt_path == run.ckpt_path
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("RANK")
    with run:  # the next checkpoint must not push the whole one out
        assert sorted(os.listdir(folder)) == ["last.ckpt.damaged", "previous.ckpt"]


def test_a_damaged_last_never_replaces_the_checkpoint_that_was_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"
    write(tmp_path, "config.yaml", "checkpoints/previous.ckpt")
    (folder / "last.ckpt").write_text("PK")
    with RunFolder(tmp_path, ckpt_path=str(folder / "previous.ckpt")):
        assert sorted(os.listdir(folder)) == ["last.ckpt.damaged", "previous.ckpt"]
    assert ": it is now last.ckpt.damaged\n" in capsys.readouterr().err
    write(tmp_path, "checkpoints/last.ckpt")
    for name in ("previous.ckpt", "last.ckpt"):
        with RunFolder(tmp_path, ckpt_path=str(folder / name)):
            assert (folder / "last.ckpt").exists()
    assert capsys.readouterr().err == ""


def test_a_link_to_nothing_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"
    write(tmp_path, "config.yaml", "checkpoints/previous.ckpt")
    (folder / "last.ckpt").symlink_to("gone.ckpt")
    with RunFolder(tmp_path, ckpt_path="last") as run:
        assert run.ckpt_path == str(folder / "previous.ckpt")
        assert sorted(os.listdir(folder)) == ["last.ckpt.damaged", "previous.ckpt"]
    assert "last.ckpt cannot be read (No such file" in capsys.readouterr().err


def test_a_kill_between_two_renames_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"
    write(tmp_path, "config.yaml", "checkpoints/previous.ckpt", "checkpoints/.last.ckpt.tmp3")
    with RunFolder(tmp_path, ckpt_path="last") as run:
        assert run.ckpt_path == str(folder / "previous.ckpt")
    line = f"{folder}/last.ckpt is missing: going on from {folder}/previous.ckpt"
    assert capsys.readouterr().err == f"lit-prune: {line}\n"


def test_last_with_nothing_whole(tmp_path: Path) -> None:
    write(tmp_path, "config.yaml", "checkpoints/x")
    for name in ("last", "previous"):
        (tmp_path / f"checkpoints/{name}.ckpt").write_text("")
    before = listing(tmp_path)
    with pytest.raises(UserError, match=r"last\.ckpt is trunc.*previous\.ckpt is .*--overwrite"):
        RunFolder(tmp_path, ckpt_path="last")
    assert listing(tmp_path) == before


def test_a_path_resumes_and_must_exist(tmp_path: Path) -> None:
    write(tmp_path, "run/config.yaml", "other.ckpt")
    path = str(tmp_path / "other.ckpt")
    assert RunFolder(tmp_path / "run", ckpt_path=path).ckpt_path == path
    with pytest.raises(UserError, match="which does not exist"):
        RunFolder(tmp_path / "run", ckpt_path=str(tmp_path / "missing.ckpt"))


def test_overwrite_and_resume_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="got both"):
        RunFolder(tmp_path, overwrite=True, ckpt_path="last")


def test_a_file_in_the_way(tmp_path: Path) -> None:
    write(tmp_path, "run")
    with pytest.raises(UserError, match="got the file"):
        RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match="can be written"), RunFolder(tmp_path / "run" / "inner"):
        pass
    assert listing(tmp_path) == {"run": "old"}


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "NODE_RANK"])
def test_other_ranks_keep_their_hands_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write(tmp_path, "config.yaml", "checkpoints/last.ckpt")
    before = listing(tmp_path)
    monkeypatch.setenv(name, "1")
    run = RunFolder(tmp_path)
    with pytest.raises(ZeroDivisionError), run:
        raise ZeroDivisionError
    assert listing(tmp_path) == before
    assert RunFolder(tmp_path, ckpt_path="last").ckpt_path is not None


def test_names() -> None:
    for name in (
        "pruned",
        "config.yaml",
        ".pruned.tmp1",
        ".report.json.9",
        "pruned.tmp",
        "pruned.old-7",
        "evaluation.json",
        "report.html",
        ".replaced-7",
    ):
        assert is_run_entry(name), name
    for name in (
        *("pruned2", "config.yaml.bak", "report.json.old", ".prunedx", "log", ".git"),
        *("pruned.old-backup", "other.old-7"),
    ):
        assert not is_run_entry(name), name


def test_half_a_checkpoint_is_not_worth_keeping(tmp_path: Path) -> None:
    write(tmp_path, "checkpoints/.last.ckpt.tmp4", "logs/x")
    (tmp_path / "pruned").mkdir()
    assert not worth_keeping(tmp_path)
    write(tmp_path, "checkpoints/last.ckpt")
    assert worth_keeping(tmp_path)
