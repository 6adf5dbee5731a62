"""scripts/tables/accuracy.py: cells, rows that are found again, the table of means, failures."""

import csv
import json
import platform

import pytest
from conftest import LITE0

from scripts.tables import accuracy, accuracy_results
from utils.cli import run_command

SMALL = [
    "--quiet", "--device", "cpu", "--precision", "fp32", "--iterations", "1", "--seeds", "0", "--set",
    "data.image_size=64", "--set", "model.weights=random", "--set", "train.batch_size=2",
    "--set", "model.width=0.5",
]  # fmt: skip


def cells_of(*argv, roots=None):
    args = accuracy.parse_arguments(["--device", "cpu", "--precision", "fp32", *argv])
    return list(accuracy.cells(accuracy.read_yaml(args.spec), roots or {}, args))


def row(seed, category="01", **values):
    key = dict.fromkeys(accuracy_results.KEY, "") | {"dataset": "btad", "model": "uninet", "flavor": "paper"}
    key |= {"category": category, "seed": str(seed), "setting": "one-class", "iterations": "10"}
    return key | {"image_auroc": "", "backbone": LITE0, "parameters": "2000000"} | values


@pytest.mark.slow
def test_one_cell_end_to_end_and_the_second_call_skips_it(
    masters, tmp_path, capfd, monkeypatch, copied_processes
):
    argv = [
        "--data", f"btad={masters['btad']}", "--datasets", "btad", "--categories", "01", "--models",
        "uninet-released", "--runs", str(tmp_path / "runs"), "--csv", str(tmp_path / "a.csv"), *SMALL,
    ]  # fmt: skip
    assert run_command(accuracy.main, argv) == 0
    out = capfd.readouterr().out
    assert "| btad | 01 | uninet, released, `--set data.image_size=64" in out
    (found,) = csv.DictReader((tmp_path / "a.csv").open())
    assert (found["dataset"], found["seed"], found["iterations"], found["image_size"]) == (
        "btad", "0", "1", "64x64",
    )  # fmt: skip
    (folder,) = (tmp_path / "runs").glob("btad/one-class/01/*/metrics.json")
    tree = json.loads(folder.read_text())
    assert float(found["pixel_auroc"]) == pytest.approx(tree["results"]["01"]["pixel_auroc"], abs=1e-5)
    assert found["aupimo"] and "aupimo" not in found["options"]
    assert int(found["parameters"]) == tree["parameters"] and found["precision"] == "fp32"
    assert "--data-root DIR" in found["command"] and str(tmp_path) not in found["command"]

    monkeypatch.setattr(accuracy.subprocess, "Popen", None)  # nothing is started any more
    assert run_command(accuracy.main, argv) == 0  # the row is there
    (tmp_path / "a.csv").unlink()
    assert run_command(accuracy.main, argv) == 0  # the folder is finished: only the row is written
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 2
    (tmp_path / "a.csv").unlink()
    written = folder.read_text()
    tree["identity"]["data"]["fingerprint"] = "x"
    folder.write_text(json.dumps(tree))
    capfd.readouterr()
    assert run_command(accuracy.main, argv) == 1  # of other images
    assert "differs in the images" in capfd.readouterr().err and not (tmp_path / "a.csv").exists()
    folder.write_text(written)
    assert run_command(accuracy.main, argv) == 0
    capfd.readouterr()
    assert run_command(accuracy.main, ["--table", "--csv", str(tmp_path / "a.csv")]) == 0
    assert capfd.readouterr().out == out


@pytest.mark.slow
def test_a_failed_cell_is_told_and_the_others_run(masters, tmp_path, capfd, copied_processes):
    argv = ["--data", f"btad={masters['btad']}", "--datasets", "btad", "--categories", "01", "--jobs", "2"]
    argv += ["--models", "memory-bank", "--runs", str(tmp_path / "runs"), "--csv", str(tmp_path / "a.csv")]
    argv += [*SMALL, "--set", "data.train_limit=1", "--set", "model.weights=missing.pth"]
    assert run_command(accuracy.main, argv) == 1
    err = capfd.readouterr().err
    assert "no weights file at missing.pth" in err and "1 of 1 cells failed" in err
    assert not (tmp_path / "a.csv").exists()


def test_cells():
    found = cells_of("--dry-run", "--datasets", "mvtec", "--categories", "bottle", "screw")
    assert len(found) == 2 * 6 * 3
    assert [c.key["seed"] for c in found[:10]] == ["0"] * 10  # seeds 0 first
    assert len({accuracy_results.identity(c.key) for c in found}) == len(found)
    bank = next(c for c in found if c.key["model"] == "memory-bank")
    assert bank.key["iterations"] == "" and "--precision" not in bank.words
    one = cells_of("--dry-run", "--datasets", "ped2", "--models", "uninet-paper", "--backbone", "resnet18")
    assert [c.config.model.backbone for c in one] == ["resnet18"] * 3


def test_every_entry_of_the_file_is_a_valid_run():
    spec = accuracy.read_yaml(accuracy.SPEC)["datasets"]
    first = [next(iter(accuracy.SPECS[(e or {}).get("config", n)].counts)) for n, e in spec.items()]
    found = cells_of("--dry-run", "--seeds", "0", "--categories", *first, "random")
    assert {c.config.data.name for c in found} == {e.get("config", n) for n, e in spec.items()}
    assert {c.key["setting"] for c in found} == {"one-class", "supervised"}


def test_data_that_is_missing_is_left_out(masters, caplog):
    caplog.set_level("INFO", logger="uninet")
    found = cells_of("--datasets", "btad", "aptos", "--seeds", "0", roots={"btad": masters["btad"]})
    assert {c.key["category"] for c in found} == {"01", "03"}
    assert "not in" in caplog.text and "skipped: 02" in caplog.text and "aptos is skipped" in caplog.text


def test_time_is_estimated_from_rows_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "MEASURED", tmp_path)
    cell = cells_of("--dry-run", "--datasets", "btad", "--models", "uninet-paper", "--seeds", "0")[0]
    device = platform.machine()
    known = row(0, train_s="30", image_size="256x256", device=device)
    other = row(1, train_s="90", image_size="256x256", device="another")
    out = accuracy.listing([cell], [known, other], device="cpu")
    assert out.startswith("100 min: python train.py --dataset btad")  # 3 s x 2000
    assert "0 of unknown time" in out
    assert "1 of unknown time" in accuracy.listing([cell], [other], device="cpu")
    copy = {"command": "python train.py --backbone tf_efficientnet_lite0", "timing": {"s_per_iteration": 6}}
    copy |= {"protocol": {"image_size": [256, 256]}, "versions": {"device": device}}
    (tmp_path / "copy.json").write_text(json.dumps(copy))
    assert accuracy.listing([cell], [], device="cpu").startswith("200 min")


def test_means_over_categories_then_seeds():
    rows = [
        row(0, "01", image_auroc="0.8"), row(0, "02", image_auroc="0.9"),
        row(1, "01", image_auroc="0.9"), row(1, "02", image_auroc="1.0"), row(2, "01", image_auroc="0.1"),
    ]  # fmt: skip
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in accuracy_results.table(rows).splitlines()]
    assert lines[0][-3:] == ["I-AUROC", "ms per image", "parameters, M"] and len(lines) == 5
    assert lines[3][6:8] == ["0, 1", "95.00 ± 7.07"]
    assert lines[4][1] == "mean of 2" and lines[4][6:] == ["0, 1", "90.00 ± 7.07", "", "2.0"]


def test_rows_keep_columns_of_an_older_file(tmp_path):
    path = tmp_path / "a.csv"
    accuracy_results.append_row(path, row(0) | {"old": "7"}, lock=tmp_path / "lock")
    accuracy_results.append_row(path, row(1), lock=tmp_path / "lock")
    assert [r["old"] for r in accuracy_results.read_rows(path)] == ["7", ""]
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no column 'dataset'"):
        accuracy_results.read_rows(path)


def test_rows_that_are_there_already(tmp_path, capfd):
    """A printed command on the file of the repository trains nothing, and says so; nor does another
    precision's row stand for the one that is asked for.
    """
    words = ["--csv", str(tmp_path / "a.csv"), "--dry-run", "--datasets", "btad", "--categories", "01"]
    words += ["--device", "cpu", "--models", "remind", "--precision"]
    assert run_command(accuracy.main, [*words, "fp32"]) == 0
    assert "nothing to train" not in capfd.readouterr().err
    cells = cells_of(*words[2:], "fp32")
    for cell in cells:
        about = {"precision": "fp32", "command": "x"}
        accuracy_results.append_row(tmp_path / "a.csv", cell.key | about, lock=tmp_path / "lock")
    assert run_command(accuracy.main, [*words, "fp32"]) == 0
    assert f"nothing to train: all rows are in {tmp_path / 'a.csv'}; --csv NEW.csv" in capfd.readouterr().err
    assert run_command(accuracy.main, [*words, "auto"]) == 0
    assert run_command(accuracy.main, [*words, "bf16"]) == 2
    assert "has this run of 01 in fp32, and bf16 is asked for; --csv NEW.csv" in capfd.readouterr().err


def test_mistakes(capfd):
    assert run_command(accuracy.main, ["--dry-run", "--datasets", "mvtec", "--categories", "bottel"]) == 2
    assert "no category to run is named bottel" in capfd.readouterr().err
    words = ["--dry-run", "--datasets", "mvtec", "--categories", "bottle", "bottel", "--seeds", "0"]
    assert run_command(accuracy.main, words) == 0
    assert "no category to run is named bottel" in capfd.readouterr().err
    assert run_command(accuracy.main, []) == 2 and "--data NAME=DIR" in capfd.readouterr().err
    assert run_command(accuracy.main, ["--data", "nosuch=x"]) == 2
    assert run_command(accuracy.main, ["--dry-run", "--models", "nosuch"]) == 2
    assert "no model 'nosuch' in the file" in capfd.readouterr().err


@pytest.mark.parametrize("text", ["kolektor=", "kolektor", "nothing=/data"])
def test_a_dataset_needs_its_folder(text, tmp_path, capfd):
    """An empty one would be the folder where the command runs."""
    assert run_command(accuracy.main, ["--data", text, "--csv", str(tmp_path / "x.csv")]) == 2
    assert "takes NAME=DIR with a name of" in capfd.readouterr().err
