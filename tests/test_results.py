"""The tables of the documents say what the JSON in docs/results says, which commands wrote."""

import ast
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

from mergevq.config.evaluation import GenerationSettings, ReconstructionSettings, Subject
from mergevq.config.generator import GeneratorConfig, Merge, SampleRun, Subindices
from mergevq.config.probing import FeatureConfig, KnnConfig, LinearConfig, ProbeRun
from mergevq.config.training import DataConfig
from mergevq.evaluate.generation import evaluate_generation
from mergevq.evaluate.probe.run import probe
from mergevq.evaluate.reconstruction import evaluate_reconstruction
from mergevq.generator.build import build_generator, save_generator
from mergevq.metrics.references import make_reference
from mergevq.runtime.artefacts import model_hash, tokens_hash
from tests.support.evaluations import write_images, write_network, write_tokenizer
from tests.support.probes import tiny_tokenizer, write_colours

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
assert SPEC is not None
assert SPEC.loader is not None
tables = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tables)

ENVIRONMENT = {"device": "cpu", "torch": "2.13.0", "git_commit": "0123456789abcdef-dirty"}
EXTRACTOR = {"name": "colours", "path": "nets/colours.pt", "sha256": "aaaabbbbccccdddd"}
MARKERS = """# Results

<!-- table: reconstruction small plain -->
<!-- end -->

Words between, which stay.

<!-- table: reconstruction-short small plain -->
<!-- end -->
<!-- table: probe small -->
<!-- end -->
<!-- table: generation merged ordered -->
what stood here before
<!-- end -->
"""

RECONSTRUCTION = """\
| model | K | PSNR (dB), given | PSNR (dB), recovered | SSIM, given | SSIM, recovered \
| LPIPS, given | LPIPS, recovered | frechet_colours, given | frechet_colours, recovered \
| cells recovered | bits of tokens | bits of source | bits, total | bits per pixel | codes in use \
| of those attainable |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|
| `small` | 16 | 22.01 | 22.01 | 0.625 | 0.625 | 0.200 | 0.200 | 30.00 | 30.00 \
| 100.0 % | 160 | 0.0 | 160.0 | 0.625 | 12.3 % | 25.0 % |
| `small` | 8 | 20.13 | 15.50 | 0.500 | 0.400 | 0.250 | 0.300 | 33.34 | 55.50 \
| 62.5 % | 80 | 20.5 | 100.5 | 0.392 | 12.3 % | 25.0 % |
| `plain` | 16 | inf | inf | 1.000 | 1.000 | 0.000 | 0.000 | 0.00 | 0.00 \
| 100.0 % | 160 | 0.0 | 160.0 | 0.625 | 12.3 % | 25.0 % |

Conditions: images 1234; of `val.parquet`; side in pixels 16; prepared centre square; features of
colours; its file aaaabbbbcccc; LPIPS alex; model 001122334455 (`small`), ffeeddccbbaa (`plain`);
made for K 8 (`small`), 16 (`plain`); precision float32; device cpu; torch 2.13.0; commit
0123456789ab-dirty."""
SHORT = """\
| model | K | PSNR (dB), given | PSNR (dB), recovered | frechet_colours, given \
| frechet_colours, recovered | bits, given | bits, recovered |
|---|---:|---:|---:|---:|---:|---:|---:|
| `small` | 16 | 22.01 | 22.01 | 30.00 | 30.00 | 160 | 160 |
| `small` | 8 | 20.13 | 15.50 | 33.34 | 55.50 | 100 | 80 |
| `plain` | 16 | inf | inf | 0.00 | 0.00 | 160 | 160 |
"""
PROBE = """\
| model | features | channels | linear | 20 nearest neighbours | 5 nearest neighbours |
|---|---|---:|---:|---:|---:|
| `small` | 8 tokens, class token | 32 | 87.5 % | 80.0 % | 75.0 % |
| - | raw pixels | 3072 | 55.5 % | 50.0 % | 40.0 % |
| - | PCA of pixels, 32 components | 32 | 60.0 % | 45.0 % | 55.0 % |

Conditions: training images 5000; of `train.parquet`; test images 100; their file `val.parquet`;
share of the most frequent class 0.5; epochs of the linear probe 90; model 001122334455; class token
aligned with self; device cpu; torch 2.13.0; commit 0123456789ab-dirty; temperature of the
neighbours' votes 0.07; neighbours leave one out False."""
GENERATION = """\
| generator | order | sampling | K | frechet_colours | class_score_colours \
| precision_colours | recall_colours |
|---|---|---|---:|---:|---:|---:|---:|
| `merged` | merge | guidance 2 | 9 | 12.35 | 3.46 | 0.500 | 0.062 |
| `ordered` | raster | guidance 2, top k 50, guidance schedule linear | 12 | 6.00 | 3.46 \
| 0.500 | 0.062 |

Conditions: samples 2000; height and width 16 and 16; compared with images 50; of `train.parquet`;
features of colours; its file aaaabbbbcccc; left out class accuracy: no classifier was given;
generator 223c3d3de295 (`merged`), 68b0a9a800b4 (`ordered`); tokenizer 001122334455; seed 3; weights
float32; device cpu; torch 2.13.0; commit 0123456789ab-dirty."""

# --------------------------------------------------------------------- what commands would write


def compared(psnr, ssim, lpips, frechet):
    metrics = {"psnr": psnr, "ssim": ssim, "l1": 0.1, "lpips": lpips}
    metrics |= {"feature_cosine_colours": 0.9, "frechet_colours": frechet}
    return {"metrics": metrics, "infinite": [n for n, v in metrics.items() if v is None]}


def result(num_kept, given, recovered, accuracy, bits):
    tokens, source = bits
    return {
        "num_kept": num_kept,
        "given": compared(*given),
        "recovered": compared(*recovered),
        "source_accuracy": accuracy,
        "codebook": {"usage": 0.1234, "attained": 0.25},
        "bits": {
            "tokens": tokens,
            "source": source,
            "total": tokens + source,
            "per_pixel": (tokens + source) / 256,
            "per_pixel_recovered": tokens / 256,
        },
    }


def reconstruction(results, digest="0011223344556677", num_kept=8):
    return {
        "kind": "reconstruction evaluation",
        "model": {"hash": digest, "config": {"num_bits": 10, "num_kept": num_kept}},
        "data": {
            "path": "somewhere/else/val.parquet",
            "num_images": 1234,
            "num_unreadable": 0,
            "pixels_sha256": "77",
            "image_size": 16,
            "crop": "centre square",
        },
        "lpips": {"trunk": "alex", "sha256": "88"},
        "extractor": EXTRACTOR,
        "precision": "float32",
        "environment": ENVIRONMENT,
        "results": results,
    }


def row(name, dim, accuracy, **rest):
    return {"name": name, "dim": dim, "accuracy": accuracy, "standard_error": 0.0123, **rest}


def probed(method, options, rows):
    return {
        "kind": "probe",
        "method": method,
        "run": {
            "method": options,
            "data": {"path": "photos/train.parquet", "val_path": "photos/val.parquet"},
            "features": {"pixel_side": 32},
        },
        "model": {"sha256": "0011223344556677", "teacher": "self"},
        "data": {
            "class_names": ["cat", "dog"],
            "most_frequent_class_accuracy": 0.5,
            "train": {"num_images": 5000, "sha256": "11"},
            "val": {"num_images": 100, "sha256": "22"},
        },
        "environment": ENVIRONMENT,
        "rows": rows,
    }


def sampled(generator, frechet, num_kept=None, **settings):
    return {
        "kind": "generation evaluation",
        "settings": {
            "run": {
                "num_kept": num_kept,
                "seed": 3,
                "weights": "float32",
                "settings": {"guidance_scale": 2.0, "temperature": 1.0, "top_k": 0} | settings,
            }
        },
        "generator": generator,
        "tokenizer": "0011223344556677",
        "samples": {"num_images": 2000, "size": [16, 16]},
        "extractor": EXTRACTOR,
        "classifier": None,
        "reference": {"path": "r.npz", "sha256": "99", "data": "x/train.parquet", "num_images": 50},
        "metrics": {
            "frechet_colours": frechet,
            "class_score_colours": 3.456,
            "class_score_colours_std": 9.0,
            "precision_colours": 0.5,
            "recall_colours": 0.0621,
        },
        "infinite": [],
        "left_out": ["class accuracy: no classifier was given"],
        "environment": ENVIRONMENT,
    }


def generator(order):
    config = {"order": order, "num_kept": 9}
    return {"kind": "generator", "config": config, "weights_sha256": "55"}


def write(folder, name, record):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(record), encoding="utf-8")


# SHA-256 of '["generator", {"num_kept": 9, "order": ORDER}, "55"]'.
MERGED = "223c3d3de29564831c1c6024629665325593a6c2bbc5abd42c99d673fc39a69a"
ORDERED = "68b0a9a800b42a618259acc80aa8914c7168df1dfce754bf1e37238448526cc4"


@pytest.fixture
def root(tmp_path):
    """A repository's documents and results."""
    results = tmp_path / "docs" / "results"
    small = [
        result(8, (20.126, 0.5004, 0.25, 33.337), (15.5, 0.4, 0.3, 55.5), 0.625, (80, 20.46)),
        result(16, (22.006, 0.625, 0.2, 30.0), (22.006, 0.625, 0.2, 30.0), 1.0, (160, 0.0)),
    ]
    plain = [result(16, (None, 1.0, 0.0, 0.0), (None, 1.0, 0.0, 0.0), 1.0, (160, 0.0))]
    write(results / "small", "reconstruction.json", reconstruction(small))
    write(results / "plain", "reconstruction.json", reconstruction(plain, "ffeeddccbbaa9988", 16))
    linear = [
        row("8 tokens, class token", 32, 0.875, rate_at_edge=True),
        row("raw pixels", 3072, 0.5547, rate_at_edge=False),
        row("PCA of pixels, 32 components", 32, 0.6, rate_at_edge=False),
    ]
    accuracies = ((0.8, 0.75), (0.5, 0.4), (0.45, 0.55))
    knn = [
        row(
            *(one["name"], one["dim"], twenty),
            by_k=[{"k": 20, "accuracy": twenty}, {"k": 5, "accuracy": five}],
        )
        for one, (twenty, five) in zip(linear, accuracies, strict=True)
    ]
    write(results / "small", "probe_linear.json", probed("linear", {"num_epochs": 90}, linear))
    options = {"temperature": 0.07, "leave_one_out": False}
    write(results / "small", "probe_knn.json", probed("knn", options, knn))
    write(results / "merged", "generation.json", sampled(MERGED, 12.346))
    write(results / "merged", "generator.json", generator("merge"))
    other = sampled(ORDERED, 6.0, 12, guidance_schedule="linear", top_k=50)
    write(results / "ordered", "generation.json", other)
    write(results / "ordered", "generator.json", generator("raster"))
    (tmp_path / "README.md").write_text("No table.\n", encoding="utf-8")
    (tmp_path / "docs" / "results.md").write_text(MARKERS, encoding="utf-8")
    return tmp_path


def table(root, words):
    """Lines that take a marker's place, without its two comments."""
    text = f"<!-- table: {words} -->\n<!-- end -->\n"
    return "\n".join(tables.rewritten(text, root / "docs" / "results").splitlines()[2:-2])


def change(root, name, path, value):
    """Write one value of a record anew."""
    file = root / "docs" / "results" / name
    record = json.loads(file.read_text(encoding="utf-8"))
    *parents, last = path.split(".")
    part = record
    for parent in parents:
        part = part[parent]
    part[last] = value
    file.write_text(json.dumps(record), encoding="utf-8")


# ------------------------------------------------------------------------------- the documents


@pytest.mark.parametrize("name", tables.DOCUMENTS)
def test_tables_say_what_the_json_says(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert tables.rewritten(text, ROOT / "docs" / "results") == text, "run: python docs/tables.py"


def test_the_script_needs_python_alone():
    tree = ast.parse((ROOT / "docs" / "tables.py").read_text(encoding="ascii"))
    plain = [node.names for node in ast.walk(tree) if isinstance(node, ast.Import)]
    imported = {alias.name for names in plain for alias in names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names


def test_writing_twice_changes_nothing_and_keeps_the_words_around(root):
    document = root / "docs" / "results.md"
    tables.main(root)
    first = document.read_text(encoding="utf-8")
    tables.main(root)
    assert document.read_text(encoding="utf-8") == first
    assert "Words between, which stay." in first
    assert "what stood here before" not in first
    assert (root / "README.md").read_text(encoding="utf-8") == "No table.\n"


def test_an_error_in_one_document_leaves_all_alone(root):
    (root / "README.md").write_text("<!-- table: probe nobody -->\n<!-- end -->\n", "utf-8")
    with pytest.raises(ValueError, match="nobody"):
        tables.main(root)
    assert (root / "docs" / "results.md").read_text(encoding="utf-8") == MARKERS


# ------------------------------------------------------------------------------------- by hand


def test_reconstruction_by_hand(root):
    assert table(root, "reconstruction small plain") == RECONSTRUCTION


def test_short_reconstruction_by_hand(root):
    assert table(root, "reconstruction-short small plain").startswith(SHORT)


def test_probe_by_hand(root):
    assert table(root, "probe small") == PROBE


def test_generation_by_hand(root):
    assert table(root, "generation merged ordered") == GENERATION


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: nonsense small -->\n<!-- end -->", "needs one of reconstruction, "),
        ("<!-- table: probe -->\n<!-- end -->", "needs one of"),
        ("<!-- table: -->\n<!-- end -->", "needs one of"),
        ("<!-- table: probe small -->\n", r"1 tables begin .* and 0 end"),
        ("<!-- end -->\n", r"0 tables begin .* and 1 end"),
        (
            "<!-- table: probe small -->\n<!-- table: probe small -->\n<!-- end -->\n<!-- end -->",
            "2 tables begin",
        ),
        ("<!-- table: probe plain -->\n<!-- end -->", r"no .*probe_linear.json; copy the JSON of"),
    ],
)
def test_a_marker_that_cannot_be_filled_is_an_error(root, text, message):
    with pytest.raises(ValueError, match=message):
        tables.rewritten(text, root / "docs" / "results")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "is the JSON of a  and must"),
        ('{"kind": "probe", "method": "linear"}', "of a linear probe and must be that of a recon"),
        ("{", "is not the JSON of a reconstruction evaluation"),
    ],
)
def test_json_of_something_else_is_an_error(root, content, message):
    (root / "docs" / "results" / "small" / "reconstruction.json").write_text(content, "utf-8")
    with pytest.raises(ValueError, match=message):
        table(root, "reconstruction small")


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        ("reconstruction small plain", "plain/reconstruction.json:data.num_images", 1),
        ("reconstruction-short small plain", "plain/reconstruction.json:extractor", None),
        ("probe small", "small/probe_knn.json:model.sha256", "1"),
        ("probe small", "small/probe_knn.json:data.val.sha256", "1"),
        ("generation merged ordered", "ordered/generation.json:reference.sha256", "1"),
        ("generation merged ordered", "ordered/generation.json:classifier", {"sha256": "1"}),
    ],
)
def test_what_was_not_measured_alike_is_not_put_together(root, words, path, value):
    file, name = path.split(":")
    change(root, file, name, value)
    with pytest.raises(ValueError, match=r"must be that of .* measured alike"):
        table(root, words)


def test_probes_of_other_features_are_not_put_together(root):
    file = root / "docs" / "results" / "small" / "probe_knn.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    change(root, "small/probe_knn.json", "rows", record["rows"][1:])
    with pytest.raises(ValueError, match=r"features of probe_knn .* must be that of probe_linear"):
        table(root, "probe small")


def test_settings_of_another_generator_are_refused(root):
    change(root, "merged/generator.json", "config.order", "raster")
    with pytest.raises(ValueError, match=f"that of generation .{MERGED}"):
        table(root, "generation merged")


# ---------------------------------------------------------------------------- what is left open


def test_a_probe_says_how_it_was_tested(root):
    change(root, "small/probe_linear.json", "run.data.val_path", None)
    change(root, "small/probe_knn.json", "run.method.leave_one_out", True)
    change(root, "small/probe_knn.json", "data.train.sha256", "1")
    written = " ".join(table(root, "probe small").split())
    assert "their file" not in written
    assert "neighbours leave one out True" in written


def test_pixels_have_one_row_for_all_models(root):
    results = root / "docs" / "results"
    for name in ("probe_linear.json", "probe_knn.json"):
        shutil.copy(results / "small" / name, results / "plain" / name)
    written = table(root, "probe small plain")
    assert written.count("| 8 tokens, class token |") == 2
    assert written.count("| raw pixels |") == 1


# --------------------------------------------------------------------------- the real commands


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Records that the commands wrote about models with random weights, and their folder."""
    folder = tmp_path_factory.mktemp("results")
    write_tokenizer(folder / "tokenizer")
    write_images(folder / "images", 6)
    write_network(folder / "colours.pt")
    tiny_tokenizer().save_pretrained(folder / "probed")
    write_colours(folder / "train", 12)
    write_colours(folder / "val", 4, seed=1)
    config = GeneratorConfig(
        order=Merge(),
        dim=16,
        num_layers=1,
        num_heads=2,
        ffn_dim=16,
        num_classes=3,
        grid_size=(4, 4),
        num_kept=8,
        kept_candidates=(8,),
        head=Subindices(sizes=(4, 4)),
    )
    generator = build_generator(config)
    tokens = tokens_hash(folder / "tokenizer")
    save_generator(generator, folder / "generator", tokenizer=tokens, class_names=["a", "b", "c"])
    return folder


def copied(root, model, **files):
    """Results as they are copied from where commands wrote them."""
    folder = root / "docs" / "results" / model
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in files.items():
        shutil.copy(path, folder / f"{name}.json")


@pytest.mark.filterwarnings("ignore:a Frechet distance of:UserWarning")
def test_what_evaluate_reconstruction_writes_can_be_read(root, tmp_path, written):
    subject = Subject(
        model=str(written / "tokenizer"),
        data=str(written / "images"),
        extractor=str(written / "colours.pt"),
        device="cpu",
        num_workers=0,
    )
    evaluate_reconstruction(
        ReconstructionSettings(
            subject=subject, out=str(tmp_path / "out"), num_kept=(8, 16), num_baseline_images=0
        )
    )
    copied(root, "real", reconstruction=tmp_path / "out" / "evaluation.json")
    lines = table(root, "reconstruction real").splitlines()
    assert "LPIPS" not in lines[0]
    assert [line.split(" | ")[:2] for line in lines[2:4]] == [["| `real`", "16"], ["| `real`", "8"]]
    assert "images 6; of `images`; side in pixels 16; prepared short side resized" in lines[5]


def test_what_probe_writes_can_be_read(root, tmp_path, written):
    data = DataConfig(path=str(written / "train"), val_path=str(written / "val"), num_workers=0)
    methods = {"linear": LinearConfig(rates=(1e-2, 1e-1), num_epochs=2), "knn": KnnConfig()}
    for name, method in methods.items():
        probe(
            ProbeRun(
                model=str(written / "probed"),
                out=str(tmp_path / name),
                method=method,
                data=data,
                features=FeatureConfig(pools=("mean",), stages=("merged",)),
                device="cpu",
            )
        )
        copied(root, "real", **{f"probe_{name}": tmp_path / name / "probe.json"})
    text = table(root, "probe real")
    assert "| `real` | 20 tokens, merged, mean |" in text
    assert "training images 36; of `train`; test images 12; their file `val`" in text
    assert f"model {model_hash(written / 'probed')[:12]}" in " ".join(text.split())


@pytest.mark.filterwarnings("ignore:a (Frechet distance|reference) of:UserWarning")
def test_what_evaluate_generation_writes_can_be_read(root, tmp_path, written):
    make_reference(
        str(written / "images"),
        tmp_path / "reference.npz",
        "generation",
        extractor=written / "colours.pt",
        image_size=16,
        batch_size=4,
        num_features=6,
        device="cpu",
    )
    evaluate_generation(
        GenerationSettings(
            reference=str(tmp_path / "reference.npz"),
            extractor=str(written / "colours.pt"),
            out=str(tmp_path / "out"),
            run=SampleRun(
                model=str(written / "generator"),
                tokenizer=str(written / "tokenizer"),
                num_images=6,
                device="cpu",
            ),
        )
    )
    copied(root, "real", generation=tmp_path / "out" / "evaluation.json")
    copied(root, "real", generator=written / "generator" / "config.json")
    text = table(root, "generation real")
    assert "\n| `real` | merge | guidance 1 | 8 |" in text
    assert "samples 6; height and width 16 and 16; compared with images 6; of `images`" in text
