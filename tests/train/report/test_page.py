import json
import re

import pytest

from astrai_train.cli import main
from astrai_train.report import write_report


@pytest.fixture
def run(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "epoch,lr,step,train/loss,val/bpb,val/loss\n0,0.1,9,2.5,,\n0,,9,,0.5,2.75\n0,0.2,19,nan,,\n"
    )
    (tmp_path / "config.yaml").write_text("model: {class_path: astrai_train.modules.SFTModule}\n")
    (tmp_path / "samples.jsonl").write_text(
        '{"step": 5, "prompt": "你好", "text": "<script>alert(1)</script>"}\n'
        '{"step": 10, "prompt": "你好", "text": "<script>alert(1)</script>"}\n'
        '{"step": 15, "prompt": "你好", "text": "我是助手"}\n'
    )
    return tmp_path


def test_the_page_tells_the_run_and_asks_nothing_of_a_network(run):
    text = write_report(run, "SIGTERM after step 20").read_text("utf-8")
    assert "SFTModule" in text
    assert "SIGTERM after step 20" in text
    assert text.count("<svg") == 3  # loss, bits per byte, learning rate
    assert text.index("Bits per byte") < text.index("Learning rate")
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    # an answer that stayed is told once
    assert re.findall(r"<td>(steps? [^<]+)</td>", text) == ["steps 5 to 10", "step 15"]
    assert not re.search(r"(src|href)=|@import|url\(", text)


def test_the_same_figures_are_json(run):
    write_report(run)
    facts = json.loads((run / "report.json").read_text("utf-8"), parse_constant=pytest.fail)
    assert facts["objective"] == "SFTModule"
    assert facts["series"]["train/loss"] == [[10, 2.5], [20, None]]
    assert facts["best"] == {"train/loss": 2.5, "val/bpb": 0.5, "val/loss": 2.75}
    assert facts["steps"] == 20
    assert facts["stopped"] is None
    assert facts["machine"]["processor"]
    assert facts["versions"]["torch"].startswith("2.")
    assert facts["samples"][2] == {"step": 15, "prompt": "你好", "text": "我是助手"}


def test_the_command_writes_it_for_a_run_that_was_killed(run, capsys):
    main(["report", str(run)])
    assert f"report: {run / 'report.html'}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_info:
        main(["report", str(run.parent)])
    assert exit_info.value.code == 1
    assert "has no metrics.csv: it is not the folder of a run" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_info:
        main(["report"])
    assert exit_info.value.code == 2
