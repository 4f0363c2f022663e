"""Commands of `mergevq export`: what they print."""

from pathlib import Path

from mergevq.cli.main import main
from mergevq.demo.site import site
from mergevq.demo.site.site import Site
from mergevq.generator.export import folder
from mergevq.generator.export.folder import ExportedFolder


def test_each_graph_has_a_line_with_its_distance_from_pytorch(monkeypatch, capsys):
    graphs = [
        {"file": "encoder_8.onnx", "equal": 1.0, "largest_difference": 0.0},
        {"file": "decoder.onnx", "equal": 1.0, "largest_difference": 2e-6},
    ]
    done = ExportedFolder(Path("out"), graphs, 1_200_000)
    monkeypatch.setattr(folder, "export_folder", lambda *_, **__: done)
    assert main(["export", "onnx"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "encoder_8.onnx  whole numbers equal 100.00%, others within 0.0e+00",
        "decoder.onnx    whole numbers equal 100.00%, others within 2.0e-06",
        "out: 1.2 MB, described in export.json",
        "next:",
        "  mergevq export web photos64",
        "  mergevq reconstruct PICTURE --model photos64",
    ]


def test_a_site_is_announced_with_the_command_that_serves_it(monkeypatch, capsys):
    monkeypatch.setattr(site, "write_site", lambda *_, **__: Site(Path("s"), (8, 9), 2_000_000, 5))
    assert main(["export", "web"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "s: 2.0 MB, of which the model 0.0; K 8, 9",
        "next:",
        "  python -m http.server --directory s",
    ]


def test_a_k_that_is_no_number_is_one_line(capsys):
    assert main(["export", "onnx", "--num-kept", "many"]) == 1
    assert "must be whole numbers: --num-kept" in capsys.readouterr().err
