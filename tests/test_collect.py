"""scripts/tables/collect.py: what is copied, and that no folder of a machine is."""

import json

from scripts.tables import collect
from utils.cli import run_command

COMMAND = (
    "python train.py --config configs/btad.yaml --data-root '/home/me/my data' --output /tmp/x --resume "
    "--category 01 --save-every 5 --set eval.every=3"
)


def write_run(folder, **changes):
    folder.mkdir(parents=True)
    tree = {
        "command": COMMAND,
        "protocol": {"iterations": 7},
        "identity": {"data": {"root": "/home/someone"}},
        "results": {"01": {"image_auroc": 0.5, "dsc": None}, "mean": {"image_auroc": 0.5}},
        "timing": {"train_s": 120, "s_per_iteration": 1, "ms_per_image": 12.4},
        "curve": [{"iteration": 3, "image_auroc": 0.25, "pro": None}],
    }
    (folder / "metrics.json").write_text(json.dumps(tree | changes))


def test_copies_and_tables(tmp_path, capfd):
    write_run(tmp_path / "runs/btad/one-class/01/uninet")
    assert run_command(collect.main, [str(tmp_path / "runs"), "--output", str(tmp_path / "out")]) == 0
    (copy,) = (tmp_path / "out").iterdir()
    assert copy.name == "btad-one-class-01-uninet.json"
    short = "python train.py --config configs/btad.yaml --data-root DIR --category 01 --set eval.every=3"
    assert json.loads(copy.read_text())["command"] == short and "home" not in copy.read_text()
    out = capfd.readouterr().out.splitlines()
    assert out[0] == "| run | category | steps | I-AUROC | training | ms per image |"
    assert out[2] == "| btad-one-class-01-uninet | 01 | 7 | 50.0 | 2 min | 12 |"
    assert short in out and out[-1] == "| btad-one-class-01-uninet | 3 | 25.0 |"


def test_a_run_folder_itself_gives_its_name(tmp_path, capfd):
    write_run(tmp_path / "first")
    assert run_command(collect.main, [str(tmp_path / "first"), "--output", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["first.json"]
    assert "| first | 01 |" in capfd.readouterr().out


def test_nothing_there(tmp_path, capfd):
    assert run_command(collect.main, [str(tmp_path)]) == 1
    assert "no metrics.json below" in capfd.readouterr().err
